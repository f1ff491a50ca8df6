"""Errors, files, formatting and the private interfaces of torch."""
