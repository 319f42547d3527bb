"""The table of benchmarks and the loader of their questions."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.data.readers import DataSourceConfig, Record, has_data_file_suffix, iterate_valid_records
from thinkpo_jax.data.record_formats import require_column, require_text
from thinkpo_jax.evaluation.evaluation_config import BenchmarkConfig
from thinkpo_jax.evaluation.grading import grade_boxed, grade_marked
from thinkpo_jax.runtime.config import UserError

BOXED_INSTRUCTION = "Return your final response within \\boxed{}. "


def _after_hashes(answer: str) -> str:
    _, hashes, number = answer.rpartition("####")
    return number.strip().replace(",", "") if hashes else ""


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark: its data set on the Hub, its prompt (`prefix` and the question) and its grader.

    `parse` turns the text of the answer column into the reference answer, which is empty if there is none.
    """

    question_column: str
    check: Callable[[Sequence[str], Sequence[str]], list[bool]]  # (responses, references) -> whether each is right
    prefix: str = ""
    hub_id: str | None = None
    subset: str | None = None
    split: str = "test"
    answer_column: str = "answer"
    parse: Callable[[str], str] = str


BENCHMARKS: dict[str, BenchmarkSpec] = {
    "miniature": BenchmarkSpec("question", grade_marked),
    "gsm8k": BenchmarkSpec("question", grade_boxed, BOXED_INSTRUCTION, "openai/gsm8k", "main", parse=_after_hashes),
    "math500": BenchmarkSpec("problem", grade_boxed, BOXED_INSTRUCTION, "HuggingFaceH4/MATH-500"),
    "aime24": BenchmarkSpec("problem", grade_boxed, BOXED_INSTRUCTION, "HuggingFaceH4/aime_2024", split="train"),
}


@dataclass(frozen=True)
class Question:
    """One question: its id within the benchmark, the conversation to answer, and the reference answer."""

    id: str
    messages: tuple[Message, ...]
    reference: str


QuestionsByBenchmark = Mapping[str, Sequence[Question]]


def questions_digest(questions: Sequence[Question]) -> str:
    """Returns a digest of questions and references. Saved answers are reused only if their digest is the same."""
    return hashlib.sha256(repr(list(questions)).encode()).hexdigest()[:16]


def load_questions(config: BenchmarkConfig, *, seed: int) -> list[Question]:
    """Loads the first `config.questions` questions of a benchmark (default: all, 1,000 for miniature).

    The id of a question is a hash of its prompt, so runs can tell which questions they share. A repeated prompt gets a
    number after the hash. The questions of miniature are held out from its training data. Raises `UserError` if the
    file is missing, or a row has no question or no reference answer.
    """
    benchmark = BENCHMARKS[config.name]
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    questions, occurrences = list[Question](), Counter[str]()
    for record_location, record in _iterate_records(config, benchmark, seed=seed):
        location = f"{config.name}, {record_location}"
        question = require_column(record, benchmark.question_column, location)
        question = require_text(question, f"{location}, {benchmark.question_column}")
        answer = require_column(record, benchmark.answer_column, location)
        reference = "" if answer is None else benchmark.parse(str(answer))
        if not reference:
            raise UserError(
                f"{location}, {benchmark.answer_column}: no reference answer. Check the benchmark's `path`."
            )
        prompt = benchmark.prefix + question
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        occurrences[digest] += 1
        question_id = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        questions.append(Question(question_id, (*system, {"role": "user", "content": prompt}), reference))
    return questions


def _iterate_records(config: BenchmarkConfig, benchmark: BenchmarkSpec, *, seed: int) -> Iterable[tuple[str, Record]]:
    if config.name == "miniature":
        records = MiniatureData(questions=config.questions or 1000).rows(seed, held_out=True)
        return ((f"generated question {index}", record) for index, record in enumerate(records))
    source = {"path": config.path or benchmark.hub_id, "limit": config.questions}
    if config.path is None:
        source["subset"] = benchmark.subset
    if config.path is None or not has_data_file_suffix(config.path):  # a file has no splits
        source["split"] = benchmark.split
    return iterate_valid_records(DataSourceConfig.model_validate(source), seed=seed)
