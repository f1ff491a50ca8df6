"""Thin bridges to training libraries, each imported by its own name and only needed with that library."""
