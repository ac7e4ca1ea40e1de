"""Training with this package is training without it: the same seed, side by side."""
