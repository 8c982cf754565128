"""Start work elsewhere: local ranks today, SLURM jobs beside them."""
