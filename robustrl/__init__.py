"""robustrl."""
