"""State dicts: write, read, convert."""
