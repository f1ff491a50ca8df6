"""The update in Triton, for GPUs."""
