"""Which questions, which prompt, which checker? One table row per benchmark."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.data.readers import iterate_valid_records
from thinkpo_jax.data.sources import DataSourceConfig, has_data_file_suffix
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.evaluation.grading import grade_boxed, grade_marked
from thinkpo_jax.runtime.config import UserError

Grader = Callable[[Sequence[str], Sequence[str]], list[bool]]
BOXED_INSTRUCTION = "Return your final response within \\boxed{}. "


@dataclass(frozen=True)
class BenchmarkSpec:
    """Where the questions of a benchmark come from, how they are asked and how answers are checked."""

    question: str
    reference: Callable[[Mapping[str, Any]], str]
    check: Grader
    prefix: str = ""
    hub: str | None = None
    subset: str | None = None
    split: str = "test"


def _column(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[name] is None else str(row[name])


def _after_hashes(row: Mapping[str, Any]) -> str:
    _, hashes, reference = str(row["answer"]).rpartition("####")
    return reference.strip().replace(",", "") if hashes else ""


BENCHMARKS: dict[str, BenchmarkSpec] = {
    "miniature": BenchmarkSpec("question", _column("answer"), grade_marked),
    "gsm8k": BenchmarkSpec(
        "question", _after_hashes, grade_boxed, BOXED_INSTRUCTION, hub="openai/gsm8k", subset="main"
    ),
    "math500": BenchmarkSpec(
        "problem", _column("answer"), grade_boxed, BOXED_INSTRUCTION, hub="HuggingFaceH4/MATH-500"
    ),
    "aime24": BenchmarkSpec(
        "problem", _column("answer"), grade_boxed, BOXED_INSTRUCTION, hub="HuggingFaceH4/aime_2024", split="train"
    ),
}


@dataclass(frozen=True)
class Question:
    """One question: its id within the benchmark, the conversation to answer, and the reference answer."""

    id: str
    messages: tuple[Message, ...]
    reference: str


def questions_digest(asked: Sequence[Question]) -> str:
    """A digest of questions and references: whether earlier answers are answers to these."""
    return hashlib.sha256(repr(list(asked)).encode()).hexdigest()[:16]


def _question_id(text: str, taken: set[str]) -> str:
    """A hash of the text, so that runs know which questions they share; a text that stands twice is told apart."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    numbered = (f"{digest}-{number}" for number in itertools.count(2))
    found = next(name for name in itertools.chain([digest], numbered) if name not in taken)
    taken.add(found)
    return found


def load_questions(config: BenchmarkConfig, *, seed: int) -> list[Question]:
    """The first `questions` questions of a benchmark; those of the miniature are held out from its training data."""
    benchmark = BENCHMARKS[config.name]
    if config.name == "miniature":
        generated = MiniatureData(questions=config.questions or 1000).rows(seed, held_out=True)
        rows = ((f"generated question {i}", row) for i, row in enumerate(generated))
    else:
        hub = {"path": benchmark.hub, "subset": benchmark.subset, "split": benchmark.split}
        where = hub if config.path is None else {"path": config.path}
        if config.path is not None and not has_data_file_suffix(config.path):
            where |= {"split": benchmark.split}
        source = DataSourceConfig.model_validate(where | {"limit": config.questions})
        rows = iterate_valid_records(source, seed=seed)
    found: list[Question] = []
    taken: set[str] = set()
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    for place, row in rows:
        try:
            question, reference = row[benchmark.question], benchmark.reference(row)
        except KeyError as error:
            problem = f"no field {error}. The row has: {', '.join(row)}"
            raise UserError(f"{place}: not a row of {config.name}: {problem}.") from None
        asked = isinstance(question, str) and question.strip()
        if not asked or not reference:
            lacking = "reference answer" if asked else "question"
            raise UserError(f"{place}: not a row of {config.name}: it has no {lacking}.")
        text = benchmark.prefix + question
        found.append(Question(_question_id(text, taken), (*system, {"role": "user", "content": text}), reference))
    return found


Asked = Mapping[str, Sequence[Question]]
