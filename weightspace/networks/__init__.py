"""Base networks: what a checkpoint belongs to."""
