"""Trains one stage: objectives, the optimizer step, checkpoints, the reference cache and the training loop.

`train_stage` in train_stage.py runs a stage from its `StageInputs`. It needs no run and no other stage. Other folders
use the config sections in stage_config.py, `make_train_step`, `CheckpointStore` and `load_or_compute_reference`.
"""
