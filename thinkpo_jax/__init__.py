"""ThinkPO (Thinking Preference Optimization, arXiv 2502.13173) in JAX: SFT, ThinkPO, evaluation, export."""

import os
import signal
import sys

# Before transformers is imported: it would advise everyone without torch to install it, and nothing here uses torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _stop(*_: object) -> None:
    """Ends a command before its first line or after its last one, where there is nothing to save."""
    sys.stderr.write("\nStopped.\n")
    sys.stderr.flush()
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # `python -m` has this value while it imports the package of the command
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(_number, _stop)

__version__ = "0.1.0"
