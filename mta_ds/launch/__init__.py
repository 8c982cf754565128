"""Starting ranks: on this machine (local), or on a Slurm cluster (scripts, slurm, pipeline)."""
