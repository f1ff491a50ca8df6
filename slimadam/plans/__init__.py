"""Compression plans: choose, save, resolve for a model."""
