"""Data and models of one benchmark: sequences of numbers, tables, and training in two stages."""
