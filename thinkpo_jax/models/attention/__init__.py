"""Causal attention over packed rows, with one kernel per device type."""
