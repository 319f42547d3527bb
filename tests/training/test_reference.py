"""Tests the cache of reference log-probs.

The log-probs are computed once and looked up by content. New examples are added to the cache, and a killed pass
resumes. Damaged records and records of another model are not used.
"""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from support import small
from support.faults import Outcome

from thinkpo_jax.data.batches import BatchPlan
from thinkpo_jax.data.examples import Example
from thinkpo_jax.training import reference_log_probs as reference
from thinkpo_jax.training.reference_cache import RECORDS_FILE, ReferenceCache, example_digest, reference_cache_folder
from thinkpo_jax.training.reference_log_probs import compute_reference, load_or_compute_reference

IDENTITY = {"weights": "w0", "dtype": "float32", "device": "cpu"}
PAIRS = small.pairs(24)


def _batches(examples: Sequence[Example] = PAIRS, *, row_length: int = 48) -> BatchPlan:
    return small.batches(examples, steps=2, size=6, row_length=row_length)


def _load_or_compute(
    batches: BatchPlan, capsys: pytest.CaptureFixture[str], **identity: str
) -> tuple[np.ndarray, str, list[int]]:
    """Returns the log-probs, the printed messages, and the counts of done batches that were reported."""
    capsys.readouterr()
    progress: list[int] = []
    log_probs = load_or_compute_reference(
        small.model(),
        batches,
        small.mesh(),
        identity=IDENTITY | identity,
        on_progress=lambda done, _: progress.append(done),
    )
    return log_probs, capsys.readouterr().err, progress


def test_the_reference_is_computed_once_and_read_back_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    expected = compute_reference(small.model(), _batches(), small.mesh())
    first, messages, progress = _load_or_compute(_batches(), capsys)
    np.testing.assert_array_equal(first, expected)
    assert "computing the log-probs of 24 examples (nothing is cached yet)" in messages
    assert progress
    cached, messages, progress = _load_or_compute(_batches(), capsys)
    assert cached.tobytes() == first.tobytes()
    assert f"the log-probs of all 24 examples are cached in {reference_cache_folder()}" in messages
    assert not progress


def test_cached_examples_are_reused_in_other_batches_and_only_new_ones_are_computed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, _, _ = _load_or_compute(_batches(PAIRS[:16]), capsys)
    # Another order, row length and batch, and eight new examples. One of them occurs twice.
    examples = [*PAIRS[::-1], PAIRS[20]]
    log_probs, messages, progress = _load_or_compute(_batches(examples, row_length=80), capsys)
    assert "computing the log-probs of 8 examples (16 others are cached)" in messages
    assert 0 < len(progress) < len(_batches(examples, row_length=80).batches_of(range(25)))
    np.testing.assert_array_equal(log_probs[:-1][::-1][:16], first)
    np.testing.assert_allclose(
        log_probs[:-1][::-1], compute_reference(small.model(), _batches(), small.mesh()), rtol=1e-5
    )
    np.testing.assert_array_equal(log_probs[-1], log_probs[3])


@pytest.mark.parametrize("name", IDENTITY)
def test_another_identity_recomputes_and_logs_the_difference(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _load_or_compute(_batches(), capsys)
    _, messages, progress = _load_or_compute(_batches(), capsys, **{name: "another"})
    assert f"computing the log-probs of 24 examples (the cached ones differ in: {name})" in messages
    assert progress
    _, messages, progress = _load_or_compute(_batches(), capsys)  # the first cache still exists
    assert not progress


def test_the_digest_depends_on_token_ids_answer_starts_and_order() -> None:
    (long, short), other = PAIRS[0], PAIRS[1]
    moved = long.__class__(long.token_ids, long.answer_start + 1)
    changed = long.__class__(
        np.append(long.token_ids[:-1], (long.token_ids[-1] + 1) % 64).astype(np.int32), long.answer_start
    )
    examples = [(long, short), (moved, short), (changed, short), (short, long), other]
    assert len({example_digest(example) for example in examples}) == 5
    assert example_digest((long, short)) == example_digest((long, short))


@pytest.mark.parametrize("damage", ["flip", "cut", "append", "empty"])
@pytest.mark.faults(Outcome.SAME)
def test_damaged_records_are_detected_and_recomputed(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, _, _ = _load_or_compute(_batches(), capsys)
    path = next(reference_cache_folder().glob(f"*/{RECORDS_FILE}"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[100] ^= 4
    path.write_bytes({"cut": content[:-7], "append": content + b"half a rec", "empty": b""}.get(damage, content))
    log_probs, messages, progress = _load_or_compute(_batches(), capsys)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
    assert ("1 of 24 records are damaged" in messages) == (damage == "flip")
    missing = {"flip": 1, "cut": 1, "append": 0, "empty": 24}[damage]
    assert (f"log-probs of {missing} examples" in messages) == (missing > 0) == bool(progress)
    _, messages, progress = _load_or_compute(_batches(), capsys)
    assert not progress
    assert "damaged" not in messages


def test_a_flip_of_any_byte_of_a_record_is_detected() -> None:
    store = ReferenceCache(IDENTITY, answers=2)
    with store.writing():
        store.add([b"0123456789abcdef"], np.arange(6, dtype=np.float32).reshape(1, 2, 3))
        path = store.folder / RECORDS_FILE
        content = path.read_bytes()
        assert len(store.read()) == 1
        for index in range(len(content)):
            path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
            assert not store.read(), index


@pytest.mark.faults(Outcome.SAME)
def test_a_killed_pass_resumes_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "killed.py"
    program.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from support import small
        from thinkpo_jax.training.reference_log_probs import load_or_compute_reference
        def on_progress(done, total):
            print(done, total, flush=True)
            if done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        identity = {"weights": "w0", "dtype": "float32", "device": "cpu"}
        batches = small.batches(small.pairs(24), steps=2, size=6)
        load_or_compute_reference(small.model(), batches, small.mesh(), identity=identity, on_progress=on_progress)
        """)
    )
    killed = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    total = int(killed.stdout.split()[1])
    assert total > 2
    log_probs, messages, progress = _load_or_compute(_batches(), capsys)
    assert "others are cached" in messages
    assert len(progress) <= total - 2 + 1
    np.testing.assert_allclose(log_probs, compute_reference(small.model(), _batches(), small.mesh()), rtol=1e-5)


def test_a_second_process_waits_and_reads_the_cache(tmp_path: Path) -> None:
    program = tmp_path / "computes.py"
    program.write_text(
        textwrap.dedent("""
        import sys, time
        from support import small
        from thinkpo_jax.training.reference_cache import ReferenceCache
        from thinkpo_jax.training.reference_log_probs import load_or_compute_reference
        identity = {"weights": "w0", "dtype": "float32", "device": "cpu"}
        batches = small.batches(small.pairs(24), steps=2, size=6)
        def on_progress(done, total):
            print("computed", done, flush=True)
            time.sleep(1)
        load_or_compute_reference(small.model(), batches, small.mesh(), identity=identity, on_progress=on_progress)
        """)
    )
    processes = [
        subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    computed = [out.count("computed") for out, _ in outputs]
    assert min(computed) == 0 < max(computed)
    (waiting_messages,) = (err for (out, err) in outputs if "computed" not in out)
    assert "are cached in" in waiting_messages


def test_log_probs_that_are_not_finite_name_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.model()
    model = jax.tree.map(lambda leaf: leaf * np.nan, model)
    with pytest.raises(reference.RunError, match=r"log-probs of example \d+ are \[nan, nan\]"):
        compute_reference(model, _batches(), small.mesh())
