"""Tables, figures and a page, made from a run's records and nothing else."""
