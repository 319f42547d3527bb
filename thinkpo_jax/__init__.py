"""ThinkPO (Thinking Preference Optimization, arXiv 2502.13173) in JAX: SFT, ThinkPO, evaluation, export."""

import os
import signal
import sys

# Before transformers is imported: it would advise everyone without torch to install it, and nothing here uses torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _stop(*_: object) -> None:
    """Ends a command before its first line or after its last one, where there is nothing to save."""
    os.write(2, b"\nStopped.\n")  # a handler may interrupt a write to sys.stderr
    os._exit(130)


# `python -m` has this value while it imports the package of the command.
if sys.argv[:1] == ["-m"] and any(argument.startswith("thinkpo_jax.") for argument in sys.orig_argv):
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(_number, _stop)

__version__ = "0.1.0"
