"""Sharded training: agreement, bytes exchanged, and checkpoints cut off at random."""
