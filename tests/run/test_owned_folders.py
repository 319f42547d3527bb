"""A run writes only into a folder of its own."""

from pathlib import Path

import pytest
from support.faults import Outcome
from support.quickstart import train_quickstart


@pytest.mark.faults(Outcome.REFUSED)
def test_a_run_never_writes_over_a_file_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"config.yaml": "mine", "thinkpo": None, "report.md": "mine"}.items():
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        path = folder / name
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        assert train_quickstart(folder) == 2
        expected = f"run_dir: {folder} has {name}, which a run would overwrite and no run has written. Choose another"
        assert expected in capsys.readouterr().err
        assert [each.name for each in folder.iterdir()] == [name]
        assert content is None or path.read_text() == content
