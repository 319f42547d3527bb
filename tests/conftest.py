"""Settings and fixtures that all tests share."""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from support.checkpoints import smollm2_folder, smollm2_missing

# These variables are set before jax is imported. Workers of pytest-xdist and processes that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    # On a busy machine, the devices' threads may reach a collective late. The default is 40.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # It would ask another server for the kind of a bucket.
# Processes that tests start can import `support` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
# Tests compile much and compute little. All processes compile in the same way, because some tests compare bits.
# `make test-all` sets this to false for a part of the tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Processes that tests start must not load programs from disk: see program_cache.py.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# Threads of torch spin while they wait. With several workers more than one thread makes it slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process that a shell starts in the background ignores Ctrl-C, and its child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.umask(0o022)  # some tests read the permissions of files

from support.faults import Outcome  # noqa: E402 -- it imports jax, too
from support.program_cache import share_programs  # noqa: E402 -- it imports jax

pytest_plugins = ["support.server"]  # has the fixture fast_retries
share_programs()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in fp32, written once per test run, also with pytest-xdist."""
    if missing := smollm2_missing():
        pytest.skip(missing)
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder that all workers share
    with FileLock(root / "smollm2.lock"):
        return smollm2_folder(root / "smollm2")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test empty caches of tokens, reference log-probs and data sets. Compiled programs are shared."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notes the outcome that a test of a fault demands. Tests of several outcomes record their own."""
    demanded = [outcome for marker in item.iter_markers("faults") for outcome in marker.args]
    item.user_properties += [("outcome of a fault", outcome.value) for outcome in demanded]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the outcomes of the faults. A test that failed may have had any outcome."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    outcomes = Counter(value for report in reports for name, value in report.user_properties if "fault" in name)
    if outcomes:
        counts = ", ".join(f"{outcomes[outcome.value]} {outcome.value}" for outcome in Outcome)
        terminalreporter.write_line(f"{outcomes.total()} faults: {counts}")


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[None]:
    """A Google Cloud Storage server with the bucket `support.buckets.BUCKET`."""
    pytest.importorskip("gcp_storage_emulator")
    from support.buckets import serve_bucket

    with serve_bucket():
        yield


@pytest.fixture
def bucket_url(
    bucket_server: None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of a new folder in the bucket. The cache folder, which has the copy, is new too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = re.sub(r"\W+", "-", request.node.name)
    return f"gs://bucket/{name}/run"
