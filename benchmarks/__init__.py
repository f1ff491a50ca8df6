"""Commands that print the project's figures and write them, with the machine they came from, to ``results/``."""
