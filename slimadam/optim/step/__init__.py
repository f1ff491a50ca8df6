"""One step: from parameter groups to the kernels."""
