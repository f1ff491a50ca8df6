"""Losses along a direction, measured without leaving a trace in the training."""
