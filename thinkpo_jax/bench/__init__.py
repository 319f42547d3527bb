"""Benchmarks of loading, of a training step against TRL, and of how cost grows with devices and row length.

`python -m thinkpo_jax.bench` runs them: `load.bench_load`, `step.bench_step` and `growth.bench_growth`. Tests of other
folders also use `load.write_checkpoint`, which writes a random model of a given size.
"""
