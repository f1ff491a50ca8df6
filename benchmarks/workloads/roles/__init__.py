"""Models whose layer roles are known."""
