"""Who gives the short answers? Another data set, a model with our own sampler, or a server."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
import numpy as np
import pydantic

from thinkpo_jax.data.chat_tokenizer import Message
from thinkpo_jax.data.record_formats import ResponseSourceConfig, iterate_responses
from thinkpo_jax.data.sources import RecordError
from thinkpo_jax.inference.engine import generate
from thinkpo_jax.inference.openai_engine import ServerConfig, request_completions
from thinkpo_jax.inference.sampling import SamplingConfig
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig, check_model_folder, quick_fingerprint, resolve_model_folder
from thinkpo_jax.models.weight_loading import load_model
from thinkpo_jax.pair_building.filters import normalize_question
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_info
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

# How the paper's rejected answers were asked for (its public code): one sample, no retry.
PAPER_SYSTEM = "You are a helpful and harmless assistant. Please reason step by step."
ANSWERS = "short_answers.jsonl"


@dataclass(frozen=True)
class ShortAnswer:
    """An answer; not `finished` where the token limit cut it. `refused`: why the question could not be asked."""

    text: str
    finished: bool = True
    error: str | None = None


class DatasetAnswersConfig(ResponseSourceConfig):
    """Rows of another data set that put the same questions (white space apart)."""

    by: Literal["join"]


class PaperSampling(SamplingConfig):
    """How the paper's rejected answers were drawn; whatever is not given is as there."""

    temperature: float = pydantic.Field(default=0.7, ge=0)
    top_p: float = pydantic.Field(default=0.9, gt=0, le=1)
    max_new_tokens: int = pydantic.Field(default=1024, ge=1)


class _Generated(ConfigSection):
    system: str | None = PAPER_SYSTEM
    sampling: PaperSampling = PaperSampling()

    @pydantic.model_validator(mode="after")
    def _one_sample(self) -> "_Generated":
        if self.sampling.samples != 1:
            raise ValueError("sampling.samples: a pair needs one short answer")
        return self


class ModelAnswersConfig(_Generated):
    """Answers of a model on this machine."""

    by: Literal["sample"]
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _pretrained(self) -> "ModelAnswersConfig":
        if self.model.weights == "random":
            raise ValueError("model.weights: a model with random weights has no answers; leave out `weights`")
        return self


class ServerAnswersConfig(_Generated):
    """Answers of a server that speaks OpenAI's chat API, such as vLLM."""

    by: Literal["request"]
    server: ServerConfig


ShortAnswersConfig = DatasetAnswersConfig | ModelAnswersConfig | ServerAnswersConfig


def collect_short_answers(
    config: ShortAnswersConfig, questions: Sequence[str], folder: Path, *, seed: int, counts: Counter[str]
) -> list[list[ShortAnswer]]:
    """The short answers to each question: those of another data set, or one that is generated; `counts` tells of which.

    What is generated is kept in `folder` as it comes, so that the same command goes on where it stopped; a question
    that was refused is asked again. Raises `UserError` where what is kept is damaged or has other settings, and where
    another data set has none of the questions.
    """
    if isinstance(config, DatasetAnswersConfig):
        return _joined(config, questions, seed=seed, counts=counts)
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    asked: list[list[Message]] = [[*system, {"role": "user", "content": question}] for question in questions]
    keys = [_key(messages) for messages in asked]
    conversations = dict(zip(keys, asked, strict=True))  # a question that stands twice is asked once
    settings = config.model_dump(mode="json", exclude={"sampling": {"batch_size"}, "mesh": True})
    if isinstance(config, ModelAnswersConfig):
        settings["model"]["fingerprint"] = quick_fingerprint(resolve_model_folder(config.model.path))
    else:
        settings["server"] = {"model": config.server.model}  # another address or pace is the same model
    path = folder / ANSWERS
    known = _load_saved_answers(path, settings | {"seed": seed})
    todo = {key: messages for key, messages in conversations.items() if key not in known}
    counts["questions, each asked once"] = len(conversations)
    counts["answered in an earlier try"] = len(conversations) - len(todo)
    log_info(f"short answers: {len(conversations) - len(todo)} of {len(conversations)} are there")
    if todo:
        with path.open("a", encoding="utf-8") as file:
            if isinstance(config, ModelAnswersConfig):
                answers = _ask_model(config, conversations, todo, seed)
            else:
                answers = _ask_server(config, conversations, todo, seed)
            for key, answer in answers:
                known[key] = answer
                if answer.error is None:
                    _append(file, {"key": key, "text": answer.text, "finished": answer.finished})
    return [[known[key]] for key in keys]


def _joined(
    config: DatasetAnswersConfig, questions: Sequence[str], *, seed: int, counts: Counter[str]
) -> list[list[ShortAnswer]]:
    found: dict[str, list[ShortAnswer]] = {}
    for read in iterate_responses(config, seed=seed):
        counts["read"] += 1
        if isinstance(read, RecordError):
            if not counts[f"bad row: {read.reason}"]:
                log_info(f"skipped, the first of its kind: {read}")
            counts[f"bad row: {read.reason}"] += 1
            continue
        _, said, _ = read
        found.setdefault(normalize_question(said.last_user_message(config.prompt_suffix)), []).append(
            ShortAnswer(said.answers[0])
        )
    keys = [normalize_question(question) for question in questions]
    wanted = set(keys)
    if keys and found and wanted.isdisjoint(found):
        raise UserError(
            f"{config.name}: has none of the {len(wanted)} questions. It asks such as {min(found)!r:.100}, and the "
            f"long answers are to such as {min(wanted)!r:.100}. Check `prompt` and `prompt_suffix` of both."
        )
    counts["to other questions"] = sum(len(answers) for key, answers in found.items() if key not in wanted)
    return [found.get(key, []) for key in keys]


def _key(messages: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24]


def _load_saved_answers(path: Path, settings: dict[str, Any]) -> dict[str, ShortAnswer]:
    """The answers of an earlier try, whose settings are the first line; a last line that was cut short is removed."""
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if not whole:
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    try:
        first, *lines = [json.loads(line) for line in whole.split(b"\n")]
        found = {line["key"]: ShortAnswer(line["text"], line["finished"]) for line in lines}
        if not (isinstance(first, dict) and all(map(_is_sound, found.values()))):
            raise ValueError("a line holds something else than settings or an answer")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error!r}. Remove it to have the answers generated again.") from None
    if first != json.loads(json.dumps(settings)):
        changed = [key for key in {**first, **settings} if first.get(key) != settings.get(key)]
        raise UserError(
            f"{path}: holds answers that were generated with other settings ({', '.join(changed)}). Choose another "
            "`out`, or remove the file to have them generated again."
        )
    with path.open("rb+") as file:
        file.truncate(len(whole) + 1)
    return found


def _is_sound(answer: ShortAnswer) -> bool:
    return isinstance(answer.text, str) and isinstance(answer.finished, bool)


def _append(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(dict(line)) + "\n")
    file.flush()


Conversations = Mapping[str, Sequence[Message]]


def _ask_model(
    config: ModelAnswersConfig, conversations: Conversations, todo: Conversations, seed: int
) -> Iterator[tuple[str, ShortAnswer]]:
    """Batches of all conversations, so that an answer is the same whether or not others were there before.

    A conversation that the tokenizer or its template cannot write is refused.
    """
    mesh = make_mesh(config.mesh)
    folder = resolve_model_folder(config.model.path)
    _, chat = check_model_folder(folder, weights=True)
    prompts: dict[str, list[int]] = {}
    for key, messages in conversations.items():
        try:
            prompts[key] = chat.encode_prompt(messages).ids
        except UserError as error:
            yield key, ShortAnswer("", finished=False, error=str(error))
    keys, size = list(prompts), config.sampling.batch_size
    if not todo.keys() & set(keys):
        return
    with jax.set_mesh(mesh), closing(ProgressReporter("short answers", len(keys), unit="answer")) as progress:
        model = load_model(folder, config.compute, mesh)
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            if todo.keys() & set(batch):
                own_seed = int(np.random.SeedSequence((seed, start)).generate_state(1)[0] >> 1)
                options = {
                    "stop_token_ids": chat.stop_token_ids,
                    "vocab_size": len(chat.tokenizer),
                    "seed": own_seed,
                    "mesh": mesh,
                }
                for key, found in zip(
                    batch, generate(model, [prompts[key] for key in batch], config.sampling, **options), strict=True
                ):
                    if key in todo:
                        yield key, ShortAnswer(chat.decode(found.ids), found.finished)
            progress.update(start + len(batch))


def _ask_server(
    config: ServerAnswersConfig, conversations: Conversations, todo: Conversations, seed: int
) -> Iterator[tuple[str, ShortAnswer]]:
    keys = list(todo)
    done = len(conversations) - len(keys)
    with closing(ProgressReporter("short answers", len(conversations), done=done, unit="answer")) as progress:
        answers = request_completions(config.server, [todo[key] for key in keys], config.sampling, seed=seed)
        with closing(answers):
            for number, (index, answer) in enumerate(answers, 1):
                yield keys[index], ShortAnswer(answer.text, answer.finished, answer.refused)
                progress.update(done + number)
