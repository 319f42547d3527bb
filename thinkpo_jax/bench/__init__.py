"""Benchmarks, and the kit that measures an accelerator. `python -m thinkpo_jax.bench` runs them.

| file | measures |
|---|---|
| `load.py` | loading a checkpoint, compared with reading its file |
| `step.py` | a ThinkPO update on the CPU, compared with TRL's |
| `generate.py` | the inference engine on the CPU, compared with `transformers_generation.py` |
| `growth.py` | memory and traffic by number of devices and row length, compiled |
| `device.py` | an accelerator, with `numerics.py`, `updates.py`, `trl.py`, `generation.py` and `quality.py` |

`pack.py` builds what `device.py` needs on a machine without a network. It runs before the packages of others are there.
"""
