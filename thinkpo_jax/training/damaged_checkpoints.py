"""Finds damaged checkpoints by their manifests, and gives them other names."""

from thinkpo_jax.models.safetensors_files import join_first
from thinkpo_jax.runtime.bucket_files import is_in_bucket
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.files import free_name
from thinkpo_jax.runtime.manifest import find_file_damage, is_of_disk
from thinkpo_jax.runtime.paths import AnyPath

COMMITTED_FILE = "commit_success.txt"  # Orbax writes it last in a bucket
ITEMS = ("model", "training")  # of a checkpoint, each a folder with a manifest


def find_checkpoint_damage(folder: AnyPath) -> str:
    """Returns how the files of a checkpoint differ from its manifests. Empty if none differs."""
    damage = [f"{item}/{line}" for item in ITEMS for line in find_file_damage(folder / item)]
    return f"damaged: {join_first(damage)}" if damage else ""


def set_damaged_aside(folder: AnyPath) -> None:
    """Renames damaged checkpoints, from the newest to the newest good one. Orbax does not look at the new names.

    Raises `UserError` for a checkpoint in a bucket that was written on a disk.
    """
    paths = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if is_in_bucket(folder):  # where a checkpoint has its final name while it is written
        for path in paths:
            if is_of_disk(path / ITEMS[0]):  # Orbax or we would remove it
                problem = f"{path}: was copied from a disk, where a checkpoint has another form"
                raise UserError(f"{problem}. A run cannot move into a bucket. Choose another run_dir.")
        paths = [path for path in paths if (path / COMMITTED_FILE).exists()]
    for name in sorted((path.name for path in paths if path.is_dir()), key=int, reverse=True):
        if not (damage := find_checkpoint_damage(folder / name)):
            return
        target = (folder / name).rename(free_name(folder / f"damaged-{name}"))
        log_warning(
            f"{folder / name}: {damage}. This checkpoint is not used, and is now called {target.name}. Training "
            "resumes from an earlier checkpoint or from the start."
        )
