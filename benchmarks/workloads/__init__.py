"""Models to measure on: shapes by name, without weights."""
