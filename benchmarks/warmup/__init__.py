"""Warmup from the critical learning rate against fixed warmups."""
