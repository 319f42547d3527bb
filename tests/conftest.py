"""What several test files share."""

import os
from pathlib import Path

import pytest
from checkpoints import smollm2_folder, smollm2_missing
from filelock import FileLock

# Before jax is imported: eight devices on the CPU, so that meshes are real.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads wait by spinning: where cores are shared (pytest-xdist), more than one makes it slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in fp32, made once per run, also under pytest-xdist."""
    if missing := smollm2_missing():
        pytest.skip(missing)
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' common folder
    with FileLock(root / "smollm2.lock"):
        return smollm2_folder(root / "smollm2")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one, or an earlier version of the code, has prepared."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
