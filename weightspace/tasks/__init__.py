"""Image tasks and query sets."""
