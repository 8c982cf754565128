"""mta_ds: distil large language models with Multi-Granular Trajectory Alignment at DeepSpeed scale."""
