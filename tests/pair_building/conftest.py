"""Fixtures of the tests that build pairs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.pairs import LONG, SHORT, UNBOXED, Config, write_jsonl
from support.server import fast_retries  # noqa: F401

from thinkpo_jax.evaluation.grading import Reference, compare_answers
from thinkpo_jax.pair_building import filters


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def known_verdicts() -> dict[tuple[str, Reference], bool]:
    """The verdicts on (answer, reference). Comparing takes seconds, so each pair is compared once."""
    return {}


@pytest.fixture
def cached_grading(known_verdicts: dict[tuple[str, Reference], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(answers: Sequence[str], references: Sequence[Reference]) -> list[bool]:
        pairs = list(zip(answers, references, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known_verdicts]
        verdicts = compare_answers([answer for answer, _ in new], [reference for _, reference in new])
        known_verdicts.update(zip(new, verdicts, strict=True))
        return [known_verdicts[pair] for pair in pairs]

    monkeypatch.setattr(filters, "compare_answers", cached)


@pytest.fixture
def joined(tmp_path: Path, tokenizer: str) -> Config:
    """Long and short answers of two files: five candidates, two of them with a wrong short answer."""
    return {
        "out": str(tmp_path / "out"),
        "tokenizer": tokenizer,
        "long": {"path": write_jsonl(tmp_path / "long.jsonl", LONG), "reference": "reference"},
        "short": {"by": "join", "path": write_jsonl(tmp_path / "short.jsonl", SHORT)},
        "filters": {"max_wrong_short_fraction": 0.4},
    }


@pytest.fixture
def miniature(tmp_path: Path) -> Config:
    """Short answers of the builtin model, two at a time."""
    return {
        "out": str(tmp_path / "out"),
        "tokenizer": "builtin:miniature",
        "long": {"generate": {"questions": 40}, "prompt": "question", "response": "long"},
        "short": {"by": "sample", "model": {"path": "builtin:miniature"}, "system": None,
                  "sampling": {"max_new_tokens": 64}, "local": {"slots": 2}},
        "filters": UNBOXED,
    }  # fmt: skip
