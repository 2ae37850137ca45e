"""Model zoos: populations of trained networks."""
