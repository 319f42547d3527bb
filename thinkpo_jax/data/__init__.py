"""Turns rows of data sets into tokenized, packed batches."""
