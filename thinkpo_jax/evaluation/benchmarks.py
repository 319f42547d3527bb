"""The benchmarks, one row of a table each, and their questions."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import pydantic

from thinkpo_jax.data.chat_template import Message
from thinkpo_jax.data.gsm8k import BOXED_INSTRUCTION, split_solution
from thinkpo_jax.data.messages import require_column, require_text
from thinkpo_jax.data.miniature import MiniatureData
from thinkpo_jax.data.readers import DataSourceConfig, Record, has_data_file_suffix, iterate_valid_records
from thinkpo_jax.evaluation.grading import Grader, Reference, grade_boxed, grade_letter, grade_marked
from thinkpo_jax.runtime.config import ConfigPath, ConfigSection, UserError, did_you_mean, matching
from thinkpo_jax.runtime.console import log_warning

LETTER_INSTRUCTION = "Return only the letter of the right choice (A, B, C or D) within \\boxed{}. "
CHOICE_COLUMNS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")  # of GPQA

# The name of a benchmark or a model, which becomes the name of a file or folder.
FileName = Annotated[str, matching(r"[A-Za-z0-9_][\w.-]*", "a name of letters, digits, `-`, `_` and `.`")]


class BenchmarkConfig(ConfigSection):
    """One benchmark: its name, where its questions are (default: the Hub) and how many to use (default: all).

    A name that is not in `BENCHMARKS` is a benchmark of the user. Its rows, at `path`, have a question and an answer.
    `system` replaces the system prompt of the evaluation.
    """

    name: FileName
    path: ConfigPath | None = None
    questions: int | None = pydantic.Field(default=None, ge=1, le=100_000)
    system: str | None = None

    @pydantic.model_validator(mode="after")
    def _check_path(self) -> "BenchmarkConfig":
        if self.name == "miniature" and self.path is not None:
            raise ValueError("the questions of miniature are generated, not read from a file. Remove `path`")
        if self.name not in BENCHMARKS and self.path is None:
            known = f"There are: {', '.join(BENCHMARKS)}"
            raise ValueError(
                f"no benchmark {self.name!r}{did_you_mean(self.name, list(BENCHMARKS))}. {known}. A benchmark of your "
                "own needs `path`, a file with the columns `question` and `answer`"
            )
        return self


def _check_names_differ(benchmarks: tuple[BenchmarkConfig, ...]) -> tuple[BenchmarkConfig, ...]:
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"a benchmark is named twice: {', '.join(repeated)}. List each benchmark once")
    return benchmarks


Benchmarks = Annotated[tuple[BenchmarkConfig, ...], pydantic.AfterValidator(_check_names_differ)]


class ParsedRow(NamedTuple):
    """A question, its reference answers (none if the row has none), and the part of the benchmark it belongs to."""

    question: str
    answers: tuple[str, ...]
    tolerances: tuple[float, ...] = ()
    group: str = ""


def _parse_row(record: Record, location: str, *, question: str = "question", answer: str = "answer") -> ParsedRow:
    """Reads a row with one answer, or a list of answers that belong together."""
    value = require_column(record, answer, location)
    answers = value if isinstance(value, list) else [value]
    if wrong := [each for each in answers if not isinstance(each, str | int | float | None)]:
        raise UserError(f"{location}, {answer}: expected a text or a number, found {wrong[0]!r}.")
    present = [each for each in answers if each is not None and each == each]  # NaN differs from itself
    texts = tuple(str(each).strip() for each in present)
    return ParsedRow(_read_text(record, question, location), texts if all(texts) else ())


def _read_text(record: Record, column: str, location: str) -> str:
    return require_text(require_column(record, column, location), f"{location}, {column}")


def _parse_problem(record: Record, location: str) -> ParsedRow:
    """Reads a row of AIME or MATH500. Only MATH500 has a level."""
    row, level = _parse_row(record, location, question="problem"), record.get("level")
    return row._replace(group="" if level is None else f"level {level}")


def _parse_gsm8k(record: Record, location: str) -> ParsedRow:
    """Reads a solution with one annotation `<<...>>` for each step, and the number after `####`."""
    row = _parse_row(record, location)
    answer = "".join(row.answers)
    steps, (_, result) = answer.count("<<"), split_solution(answer)
    return row._replace(answers=(result,) if result else (), group=f"{steps} step{'' if steps == 1 else 's'}")


def _parse_olympiadbench(record: Record, location: str) -> ParsedRow:
    """Reads a row with a list of answers, and the absolute errors that their numbers may have."""
    row, error = _parse_row(record, location, answer="final_answer"), record.get("error")
    try:
        tolerances = tuple(float(part) for part in str(error or "").split(",") if part.strip())
    except ValueError:
        raise UserError(f"{location}, error: expected a number or null, found {error!r}.") from None
    return row._replace(tolerances=tolerances)


def _parse_gpqa(record: Record, location: str) -> ParsedRow:
    """Reads a question with four choices. Their order depends on the question alone, so it is the same for all runs."""
    question = _read_text(record, "Question", location).strip()
    if record.get(CHOICE_COLUMNS[0]) is None:
        return ParsedRow(question, ())
    choices = [_read_text(record, column, location).strip() for column in CHOICE_COLUMNS]
    order = sorted(range(len(choices)), key=lambda index: hashlib.sha256(f"{index} {question}".encode()).digest())
    lines = [f"{letter}) {choices[index]}" for letter, index in zip("ABCD", order, strict=True)]
    return ParsedRow("\n".join([question, *lines]), ("ABCD"[order.index(0)],))


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark: how its rows are read, its data set on the Hub, its prompt and its grader.

    The prompt is `prefix` and the question. The grader extracts the answers.
    """

    parse: Callable[[Record, str], ParsedRow]  # (row, its place in messages)
    grade: Grader
    prefix: str = BOXED_INSTRUCTION
    hub_id: str | None = None
    subset: str | None = None
    split: str = "test"


BENCHMARKS: dict[str, BenchmarkSpec] = {
    "miniature": BenchmarkSpec(_parse_row, grade_marked, prefix=""),
    "gsm8k": BenchmarkSpec(_parse_gsm8k, grade_boxed, hub_id="openai/gsm8k", subset="main"),
    "math500": BenchmarkSpec(_parse_problem, grade_boxed, hub_id="HuggingFaceH4/MATH-500"),
    "aime24": BenchmarkSpec(_parse_problem, grade_boxed, hub_id="HuggingFaceH4/aime_2024", split="train"),
    "aime25": BenchmarkSpec(_parse_problem, grade_boxed, hub_id="math-ai/aime25"),
    "gpqa_diamond": BenchmarkSpec(
        _parse_gpqa, grade_letter, LETTER_INSTRUCTION, hub_id="Idavidrein/gpqa", subset="gpqa_diamond", split="train"
    ),
    "olympiadbench": BenchmarkSpec(
        _parse_olympiadbench, grade_boxed, hub_id="Hothan/OlympiadBench", subset="OE_TO_maths_en_COMP", split="train"
    ),
}
USER_BENCHMARK = BenchmarkSpec(_parse_row, grade_boxed)


def benchmark_spec(name: str) -> BenchmarkSpec:
    """Returns the row of a benchmark in the table. A name that is not there is a benchmark of the user."""
    return BENCHMARKS.get(name, USER_BENCHMARK)


@dataclass(frozen=True)
class Question:
    """One question: its id within the benchmark, the conversation to answer, and the reference answer.

    `group` is the part of the benchmark that it belongs to, such as "level 3". It is empty if there are none.
    """

    id: str
    messages: tuple[Message, ...]
    reference: Reference
    group: str = ""


QuestionsByBenchmark = Mapping[str, Sequence[Question]]


def load_questions(config: BenchmarkConfig, *, seed: int, system: str | None = None) -> list[Question]:
    """Loads the first `config.questions` questions of a benchmark (default: all, 1,000 for miniature).

    The id of a question is a hash of its prompt, so runs can tell which questions they share. A repeated prompt gets a
    number after the hash. The questions of miniature are held out from its training data. Rows without a reference
    answer are left out, with a warning that counts them. Raises `UserError` if the file is missing, a row has no
    question, or no row has a reference answer.
    """
    spec, system = benchmark_spec(config.name), system if config.system is None else config.system
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    questions, occurrences, without_answer = list[Question](), Counter[str](), list[str]()
    for record_location, record in _iterate_records(config, seed=seed):
        location = f"{config.name}, {record_location}"
        row = spec.parse(record, location)
        if not row.answers:
            without_answer.append(location)
            continue
        prompt = spec.prefix + row.question
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        occurrences[digest] += 1
        question_id = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        messages: tuple[Message, ...] = (*before, {"role": "user", "content": prompt})
        questions.append(Question(question_id, messages, Reference(row.answers, row.tolerances), row.group))
    if not questions:
        count = f"None of the {len(without_answer)} rows that were read has one"
        raise UserError(f"{without_answer[0]}: no reference answer. {count}. Check the benchmark's `path`.")
    if without_answer:
        count = f"{len(without_answer)} of {len(questions) + len(without_answer)} rows have no reference answer"
        log_warning(f"{config.name}: {count} and are left out. The first: {without_answer[0]}.")
    return questions


def question_texts(benchmark: str, questions: Sequence[Question]) -> list[str]:
    """Returns the questions of a benchmark without the text that it puts before each."""
    return [question.messages[-1]["content"].removeprefix(benchmark_spec(benchmark).prefix) for question in questions]


def _iterate_records(config: BenchmarkConfig, *, seed: int) -> Iterable[tuple[str, Record]]:
    if config.name == "miniature":
        records = MiniatureData(questions=config.questions or 1000).rows(seed, held_out=True)
        return ((f"generated question {index}", record) for index, record in enumerate(records))
    spec = benchmark_spec(config.name)
    subset = spec.subset if config.path is None else None
    is_file = config.path is not None and has_data_file_suffix(config.path)
    split = "train" if is_file else spec.split  # a file has no splits, so it gets the default
    source = DataSourceConfig(path=config.path or spec.hub_id, limit=config.questions, subset=subset, split=split)
    return iterate_valid_records(source, seed=seed)
