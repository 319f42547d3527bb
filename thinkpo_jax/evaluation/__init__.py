"""Benchmarks, grading, statistics, report."""
