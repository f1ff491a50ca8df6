"""Time and memory of a step."""
