"""Compiles a stage for devices that are not attached, and reports memory and traffic."""
