"""Which questions, which prompt, which checker? One table row per benchmark."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from thinkpo_jax.answers import boxed_answers, marked_answers
from thinkpo_jax.chat import Message
from thinkpo_jax.config import Section, UserError
from thinkpo_jax.data import DataConfig, read_rows
from thinkpo_jax.miniature import MiniatureData

Checker = Callable[[Sequence[str], Sequence[str]], list[bool]]
BOXED = "Return your final response within \\boxed{}. "


@dataclass(frozen=True)
class Benchmark:
    """Where the questions of a benchmark come from, how they are asked and how answers are checked."""

    question: str
    reference: Callable[[Mapping[str, Any]], str]
    check: Checker
    prefix: str = ""
    hub: str | None = None
    subset: str | None = None
    split: str = "test"


def _column(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[name])


def _after_hashes(row: Mapping[str, Any]) -> str:
    return str(row["answer"]).rpartition("####")[2].strip().replace(",", "")


TABLE: dict[str, Benchmark] = {
    "miniature": Benchmark("question", _column("answer"), marked_answers),
    "gsm8k": Benchmark("question", _after_hashes, boxed_answers, BOXED, hub="openai/gsm8k", subset="main"),
    "math500": Benchmark("problem", _column("answer"), boxed_answers, BOXED, hub="HuggingFaceH4/MATH-500"),
}


class BenchmarkConfig(Section):
    """One benchmark to run: its row of the table, where its questions are (default: the Hub), and how many."""

    name: Literal["miniature", "gsm8k", "math500"]
    path: str | None = None
    questions: int | None = pydantic.Field(default=None, ge=1)
    system: str | None = None


@dataclass(frozen=True)
class Question:
    """One question: its id within the benchmark, the conversation to answer, and the reference answer."""

    id: str
    messages: tuple[Message, ...]
    reference: str


def questions(config: BenchmarkConfig, *, seed: int) -> list[Question]:
    """The first `questions` questions of a benchmark; those of the miniature are held out from its training data."""
    benchmark = TABLE[config.name]
    if config.name == "miniature":
        source = DataConfig(generate=MiniatureData(questions=config.questions or 1000, held_out=True))
    else:
        path, subset = config.path or benchmark.hub, None if config.path else benchmark.subset
        source = DataConfig(path=path, subset=subset, split=benchmark.split, limit=config.questions)
    found: list[Question] = []
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    for number, (place, row) in enumerate(read_rows(source, seed=seed)):
        try:
            text, reference = benchmark.prefix + row[benchmark.question], benchmark.reference(row)
        except (KeyError, TypeError) as error:
            raise UserError(f"{place}: not a row of {config.name}: {error}. The row has: {', '.join(row)}.") from None
        found.append(Question(str(number), (*system, {"role": "user", "content": text}), reference))
    return found
