"""Second moments of sharded parameters."""
