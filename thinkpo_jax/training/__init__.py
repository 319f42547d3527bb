"""Objectives, optimizer step, checkpoints, reference cache and the loop of one stage."""
