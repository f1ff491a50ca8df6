"""Loss of whole training runs."""
