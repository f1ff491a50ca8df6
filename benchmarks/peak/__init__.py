"""Peaks of memory, measured: of training, of a step, and of checkpoints."""
