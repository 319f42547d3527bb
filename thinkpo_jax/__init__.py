"""ThinkPO (Thinking Preference Optimization, arXiv 2502.13173) in JAX: SFT, ThinkPO, evaluation, export."""

__version__ = "0.1.0"
