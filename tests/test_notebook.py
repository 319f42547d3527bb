"""The notebook runs from the first cell to the last with small settings, and is stored without outputs."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "colab" / "quickstart.ipynb"
SMALL = [
    "stages.sft.steps=4",
    "stages.thinkpo.steps=2",
    "stages.control.steps=2",
    "evaluation.benchmarks.0.questions=12",
    "evaluation.local.slots=12",
]
PLOTS = ("accuracy", "response_length", "rewards", "loss")


def read() -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_notebook_is_stored_without_outputs():
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.slow
# The notebook client warns about its own sockets and event loop.
@pytest.mark.filterwarnings("default")
def test_notebook_runs(tmp_path: Path):
    notebook = read()
    (parameters,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    parameters.source += f"\nRUN_DIR = {str(tmp_path / 'run')!r}\nSETTINGS = {SMALL!r}\n"
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute(env=one_device)
    assert "thinkpo" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    markdown = "".join(output.get("data", {}).get("text/markdown", "") for output in outputs["report"])
    assert "thinkpo" in markdown
    assert "](plots/" not in markdown  # each plot has its own cell
    for plot in PLOTS:
        assert (tmp_path / "run" / "plots" / f"{plot}.png").stat().st_size > 0
        (output,) = outputs[f"plot-{plot.replace('_', '-')}"]
        assert "image/png" in output["data"]
