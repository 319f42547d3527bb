"""ThinkPO (Thinking Preference Optimization, arXiv 2502.13173) in JAX: SFT, ThinkPO, evaluation, export."""

import os

# Before transformers is imported: it would advise everyone without torch to install it, and nothing here uses torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
