"""Checks the files of a model folder before they are read or copied. A downloaded folder can hold anything."""

from pathlib import Path

from thinkpo_jax.data.tokenizer_files import TOKENIZER_FILE_PATTERNS
from thinkpo_jax.runtime.config import UserError, collect_errors

# From the start model to an export.
COPIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILE_PATTERNS, "LICENSE*", "NOTICE*")


def check_file_kinds(folder: Path) -> None:
    """Raises `UserError` for a pipe, a socket or a device in the folder. Opening it may wait forever."""
    if special := sorted(
        each.name for each in folder.iterdir() if each.exists() and not (each.is_file() or each.is_dir())
    ):
        raise UserError(
            f"{folder}: expected only files and folders, found a pipe, socket or device: {', '.join(special)}."
        )


def list_copied_files(folder: Path) -> list[Path]:
    """Returns the files that an export copies from the folder of its start model.

    A link must lead to a file of the same folder. In the cache of the Hub, it may lead to the blobs of its repository.
    Raises `UserError` for any other link, because the export could publish a private file.
    """
    real = folder.resolve()
    allowed = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    files = sorted({file for pattern in COPIED_FILES for file in folder.glob(pattern) if file.is_file()})
    with collect_errors() as collector:
        for file in files:
            target = file.resolve()
            if not any(target.is_relative_to(each) for each in allowed):
                collector.fail(
                    f"{file}: expected a file of the model, found a link to {target}. An export would copy that file. "
                    "Replace the link with a copy if it belongs to the model. Otherwise remove it."
                )
    return files
