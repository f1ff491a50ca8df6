"""Figures in the README and the docs, filled in from result files."""
