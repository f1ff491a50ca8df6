"""Sharpness through training: cost, regimes, tracking, schedules."""
