"""Measures loading, training steps, generation and accelerators."""
