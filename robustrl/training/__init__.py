"""How a network gets robust."""
