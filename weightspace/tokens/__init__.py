"""Weights as sequences of tokens."""
