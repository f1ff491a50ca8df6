"""The update compiled for CPUs."""
