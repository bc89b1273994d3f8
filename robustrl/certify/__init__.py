"""What can be proven: evidence in, certificate out. Nothing here steps an environment."""
