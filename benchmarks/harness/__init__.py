"""Timing, comparing and checking, shared by all benchmarks."""
