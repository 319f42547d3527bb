"""Collects short answers to questions, from another data set, a model on this machine or a server."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import pydantic

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer
from thinkpo_jax.data.readers import RecordError
from thinkpo_jax.data.record_formats import ResponseSourceConfig, iterate_responses
from thinkpo_jax.inference.engine import Completion, Engine, Request, SamplingConfig
from thinkpo_jax.inference.engine_config import EngineConfig
from thinkpo_jax.inference.local_engine import LocalEngine
from thinkpo_jax.inference.openai_engine import ServerEngine
from thinkpo_jax.inference.saved_answers import SavedAnswers
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig, model_identity, resolve_model_folder, resolve_model_source
from thinkpo_jax.pair_building.filters import normalize_question
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_info, log_warning

# The paper's public code generates rejected answers with this prompt and `PaperSampling`: one sample, no retry.
PAPER_SYSTEM = "You are a helpful and harmless assistant. Please reason step by step."


class DatasetAnswersConfig(ResponseSourceConfig):
    """Rows of another data set with the same questions. White space may differ."""

    by: Literal["join"]


class PaperSampling(SamplingConfig):
    """The paper's sampling parameters: `SamplingConfig` with another `top_p`, and one sample for each pair."""

    top_p: float = pydantic.Field(default=0.9, gt=0, le=1)
    samples: int = pydantic.Field(default=1, ge=1, le=1)


class GeneratedAnswersConfig(EngineConfig):
    """Answers of a model on this machine, or of a server with OpenAI's chat API, such as vLLM.

    `model` and `compute` belong to the local engine.
    """

    by: Literal["sample"]
    system: str | None = PAPER_SYSTEM
    sampling: PaperSampling = PaperSampling()
    model: ModelConfig | None = None
    compute: ComputeConfig = ComputeConfig()

    @pydantic.model_validator(mode="after")
    def _check_model(self) -> "GeneratedAnswersConfig":
        if self.engine == "local" and self.model is None:
            raise ValueError("`engine: local` needs the section `model`. Add it, or set `engine: server`")
        if self.engine == "server" and (self.model is not None or self.compute != ComputeConfig()):
            raise ValueError("`model` and `compute` have no effect with `engine: server`. Remove them")
        if self.model is not None and self.model.weights == "random":
            raise ValueError("model.weights: a model with random weights has no answers. Leave out `weights`")
        return self


ShortAnswersConfig = DatasetAnswersConfig | GeneratedAnswersConfig


def collect_short_answers(
    config: ShortAnswersConfig,
    questions: Sequence[str],
    folder: Path,
    *,
    seed: int,
    tokenizer: ChatTokenizer,
    counts: Counter[str],
) -> list[list[Completion]]:
    """Returns the short answers to each question: those of another data set, or one that is generated.

    Generated answers are saved in `folder` as they arrive, so a rerun generates only the missing ones. Refused
    questions are sent again. The `tokenizer` counts the tokens of a server's answers. `counts` gets the numbers of
    questions and answers. Raises `UserError` if the saved answers are damaged or have other settings, or the data set
    has none of the questions.
    """
    if isinstance(config, DatasetAnswersConfig):
        return _join_dataset(config, questions, seed=seed, thinking=tokenizer.thinking, counts=counts)
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    prompts: list[list[Message]] = [[*system, {"role": "user", "content": question}] for question in questions]
    keys = [hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24] for messages in prompts]
    conversations = dict(zip(keys, prompts, strict=True))  # a repeated question is sent once
    requests = list(starmap(Request, conversations.items()))
    settings = _answer_settings(config, tokenizer.thinking) | {"seed": seed}
    saved = SavedAnswers(folder / "short_answers.jsonl", settings, on_mismatch="refuse")
    num_saved = len(saved.completions.keys() & conversations.keys())
    counts["questions, each asked once"] = len(conversations)
    counts["answered in an earlier try"] = num_saved
    log_info(f"short answers: {num_saved} of {len(conversations)} are saved already")
    if num_saved < len(conversations):
        engine = _make_engine(config, tokenizer, seed=seed)
        answers = saved.complete(engine, requests, config.sampling, seed=seed, title="short answers")
    else:
        answers = saved.completions
    return [[answers[key]] for key in keys]


def _answer_settings(config: GeneratedAnswersConfig, thinking: ThinkingFormat) -> dict[str, Any]:
    """Returns what determines the answers. A model may lie at another path, and a server have another url."""
    settings = config.model_dump(mode="json", include={"by", "engine", "system", "sampling"})
    if config.model is not None:
        identity = model_identity(resolve_model_folder(config.model.path))
        arguments = config.model.model_dump(include={"template_arguments"}, exclude_defaults=True)
        settings["model"] = {"weights": config.model.weights, "identity": identity, **arguments}
        settings["dtype"] = config.compute.dtype
    if config.server is not None:
        settings["server"] = config.server.model_dump(include={"model", "template_arguments"}, exclude_defaults=True)
        if thinking != ThinkingFormat():
            settings["thinking_tags"] = [thinking.before, thinking.after]
    return settings


def _make_engine(config: GeneratedAnswersConfig, tokenizer: ChatTokenizer, *, seed: int) -> Engine:
    if config.server is not None:
        return ServerEngine(config.server, tokenizer.thinking, tokenizer)
    assert config.model is not None  # `GeneratedAnswersConfig` checks it
    return LocalEngine(resolve_model_source(config.model, seed=seed), config.compute, config.local)


def count_skipped_row(error: RecordError, counts: Counter[str]) -> None:
    """Counts a row that is skipped under its reason. Logs the first row of each reason."""
    reason = f"bad row: {error.reason}"
    counts[reason] += 1
    if counts[reason] == 1:
        log_warning(f"skipped this row, and will skip others with the same problem: {error}")


def _join_dataset(
    config: DatasetAnswersConfig, questions: Sequence[str], *, seed: int, thinking: ThinkingFormat, counts: Counter[str]
) -> list[list[Completion]]:
    answers: defaultdict[str, list[Completion]] = defaultdict(list)
    for response in iterate_responses(config, seed=seed, thinking=thinking):
        counts["read"] += 1
        if isinstance(response, RecordError):
            count_skipped_row(response, counts)
        else:
            question = normalize_question(response[1].last_user_message(config.prompt_suffix))
            answers[question].append(Completion(text=response[1].answers[0]))
    keys = [normalize_question(question) for question in questions]
    if keys and answers and answers.keys().isdisjoint(keys):
        raise UserError(
            f"{config.name} has none of the {len(set(keys))} questions. One of its questions is {min(answers)!r:.100}, "
            f"and one with a long answer is {min(keys)!r:.100}. Check `prompt` and `prompt_suffix` of both."
        )
    counts["to other questions"] = sum(len(answers[key]) for key in answers.keys() - set(keys))
    return [answers[key] for key in keys]
