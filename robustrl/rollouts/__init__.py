"""Episodes in, returns out: vectorised, seeded, resumable, parallel."""
