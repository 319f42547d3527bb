"""Runs commands on a file system that is too small for them."""

import shutil
import subprocess

import pytest


def on_small_disk(size: str) -> list[str]:
    """Returns the beginning of a command with a new file system of this size at /mnt. Skips if it cannot have one."""
    command = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /mnt && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a file system")
    return command
