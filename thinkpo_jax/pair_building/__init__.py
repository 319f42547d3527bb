"""Builds preference pairs from long and short answers."""
