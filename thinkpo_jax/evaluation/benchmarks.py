"""Loads the questions of benchmarks, and finds training questions that occur in a benchmark."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from thinkpo_jax.data.chat_template import Message
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.data.readers import DataSourceConfig, Record, has_data_file_suffix, iterate_valid_records
from thinkpo_jax.data.record_formats import require_column, require_text
from thinkpo_jax.evaluation.grading import grade_boxed, grade_marked
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError

BOXED_INSTRUCTION = "Return your final response within \\boxed{}. "
Tokens = tuple[str, ...]
CONTAMINATION_NGRAM = 13  # tokens in a row that two questions share if one is a copy of the other
MIN_MATCH_TOKENS = 4  # a shorter question ("Compute 2+3") matches only a question that equals it
# Drawings, typesetting commands and AIME's closing phrase occur in unrelated questions.
_IGNORED_TEXT = re.compile(
    r"\[asy\].*?\[/asy\]|\\(?:left|right)(?![a-z])|\\[^a-z]|"
    r"where\W+\w\W+and\W+\w\W+are\s+(?:relatively\s+prime|coprime)\s+positive\s+integers",
    re.DOTALL,
)
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+|[^\w\s$\\{}.,;:!?'\"`]")


class BenchmarkConfig(ConfigSection):
    """One benchmark: its name, where its questions are (default: the Hub) and how many to use (default: all)."""

    name: Literal["miniature", "gsm8k", "math500", "aime24"]
    path: ConfigPath | None = None
    questions: int | None = pydantic.Field(default=None, ge=1, le=100_000)
    system: str | None = None

    @pydantic.model_validator(mode="after")
    def _check_path(self) -> "BenchmarkConfig":
        if self.name == "miniature" and self.path is not None:
            raise ValueError("the questions of miniature are generated, not read from a file. Remove `path`")
        return self


def _check_names_differ(benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[BenchmarkConfig, ...]:
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"a benchmark is named twice: {', '.join(repeated)}. List each benchmark once")
    return benchmarks


Benchmarks = Annotated[tuple[BenchmarkConfig, ...], pydantic.AfterValidator(_check_names_differ)]


def _after_hashes(answer: str) -> str:
    _, hashes, number = answer.rpartition("####")
    return number.strip().replace(",", "") if hashes else ""


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark: its data set on the Hub, its prompt (`prefix` and the question) and its grader.

    `parse` turns the text of the column "answer" into the reference answer, which is empty if there is none.
    """

    question_column: str
    check: Callable[[Sequence[str], Sequence[str]], list[bool]]  # (responses, references) -> whether each is right
    prefix: str = ""
    hub_id: str | None = None
    subset: str | None = None
    split: str = "test"
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
        answer = require_column(record, "answer", location)
        reference = "" if answer is None else benchmark.parse(str(answer))
        if not reference:
            raise UserError(f"{location}, answer: no reference answer. Check the benchmark's `path`.")
        prompt = benchmark.prefix + question
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        occurrences[digest] += 1
        question_id = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        questions.append(Question(question_id, (*system, {"role": "user", "content": prompt}), reference))
    return questions


def question_texts(benchmark: str, questions: Sequence[Question]) -> list[str]:
    """Returns the questions of a benchmark without the text that it puts before each."""
    prefix = BENCHMARKS[benchmark].prefix
    return [question.messages[-1]["content"].removeprefix(prefix) for question in questions]


def _iterate_records(config: BenchmarkConfig, benchmark: BenchmarkSpec, *, seed: int) -> Iterable[tuple[str, Record]]:
    if config.name == "miniature":
        records = MiniatureData(questions=config.questions or 1000).rows(seed, held_out=True)
        return ((f"generated question {index}", record) for index, record in enumerate(records))
    subset = benchmark.subset if config.path is None else None
    is_file = config.path is not None and has_data_file_suffix(config.path)
    split = "train" if is_file else benchmark.split  # a file has no splits, so it gets the default
    source = DataSourceConfig(path=config.path or benchmark.hub_id, limit=config.questions, subset=subset, split=split)
    return iterate_valid_records(source, seed=seed)


@dataclass(frozen=True)
class ContaminationMatch:
    """Question number `index` and a held-out question of a benchmark share the tokens in `shared`."""

    index: int
    benchmark: str
    held_out: str
    shared: str


def find_contamination(
    questions: Sequence[str], held_out: Mapping[str, Sequence[str]], *, ngram: int
) -> list[ContaminationMatch]:
    """Returns the pairs of a question and a held-out question that share text, in the order of `questions`.

    A pair matches if one question contains the other, or if both contain the same `ngram` tokens (at least 4) in a row.
    Tokens are lower-cased words, numbers, LaTeX commands and operators. The keys of `held_out` are benchmark names.
    With 13 tokens, copies with other numbers or names are found. With 8, most matches are common phrases, such as "how
    many hours a week does he spend".
    """
    known = [(benchmark, text) for benchmark, texts in held_out.items() for text in texts]
    question_tokens = [_tokenize(text) for text in questions]
    held_out_tokens = [_tokenize(text) for _, text in known]
    shared = {(i, j): question_tokens[i] for i, j in _find_contained(question_tokens, held_out_tokens)}
    shared |= {(i, j): held_out_tokens[j] for j, i in _find_contained(held_out_tokens, question_tokens)}
    held_out_by_ngram: defaultdict[Tokens, set[int]] = defaultdict(set)
    for j, run in _ngrams(held_out_tokens, ngram):
        held_out_by_ngram[run].add(j)
    for i, run in _ngrams(question_tokens, ngram):
        for j in held_out_by_ngram.get(run, ()):
            shared.setdefault((i, j), run)
    same = {(i, j) for i, j in shared if question_tokens[i] == held_out_tokens[j]}
    texts = {key: "the whole question" if key in same else " ".join(run) for key, run in shared.items()}
    return [ContaminationMatch(i, *known[j], texts[i, j]) for i, j in sorted(shared)]


def _tokenize(text: str) -> Tokens:
    plain = unicodedata.normalize("NFKC", text).lower().replace("\\dfrac", "\\frac")
    return tuple(_TOKEN.findall(_IGNORED_TEXT.sub(" ", plain)))


def _ngrams(texts: Sequence[Tokens], size: int) -> Iterator[tuple[int, Tokens]]:
    for index, tokens in enumerate(texts):
        yield from ((index, tokens[start : start + size]) for start in range(len(tokens) - size + 1))


def _find_contained(parts: Sequence[Tokens], texts: Sequence[Tokens]) -> Iterator[tuple[int, int]]:
    """Yields (part, text) indices if the text contains the part. A part of under `MIN_MATCH_TOKENS` must equal it."""
    parts_by_start: defaultdict[Tokens, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        parts_by_start[part[:MIN_MATCH_TOKENS]] += [i] if part else []
    for j, text in enumerate(texts):
        for start in range(max(1, len(text) - MIN_MATCH_TOKENS + 1)):
            candidates = parts_by_start.get(text[start : start + MIN_MATCH_TOKENS], ())
            yield from ((i, j) for i in candidates if text[start : start + len(parts[i])] == parts[i])
