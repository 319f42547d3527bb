"""Collects short answers to questions, from another data set, a model on this machine or a server."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pydantic

from thinkpo_jax.data.chat_template import Message, ThinkingFormat
from thinkpo_jax.data.readers import RecordError
from thinkpo_jax.data.record_formats import ResponseSourceConfig, iterate_responses
from thinkpo_jax.inference.engine import Completion, SamplingConfig, generate
from thinkpo_jax.inference.openai_engine import ServerConfig, request_completions
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelConfig, quick_fingerprint, resolve_model_folder, resolve_model_source
from thinkpo_jax.pair_building.filters import normalize_question
from thinkpo_jax.runtime.config import ConfigSection, UserError
from thinkpo_jax.runtime.console import ProgressReporter, log_info, log_warning
from thinkpo_jax.runtime.mesh import MeshConfig, make_mesh

# The paper's public code generates rejected answers with this prompt and `PaperSampling`: one sample, no retry.
PAPER_SYSTEM = "You are a helpful and harmless assistant. Please reason step by step."
Conversations = Mapping[str, Sequence[Message]]


class DatasetAnswersConfig(ResponseSourceConfig):
    """Rows of another data set with the same questions. White space may differ."""

    by: Literal["join"]


class PaperSampling(SamplingConfig):
    """The paper's sampling parameters: `SamplingConfig` with another `top_p`, and one sample for each pair."""

    top_p: float = pydantic.Field(default=0.9, gt=0, le=1)
    samples: int = pydantic.Field(default=1, ge=1, le=1)


class _GeneratedAnswersConfig(ConfigSection):
    system: str | None = PAPER_SYSTEM
    sampling: PaperSampling = PaperSampling()


class ModelAnswersConfig(_GeneratedAnswersConfig):
    """Answers of a model on this machine."""

    by: Literal["sample"]
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.model_validator(mode="after")
    def _check_weights(self) -> "ModelAnswersConfig":
        if self.model.weights == "random":
            raise ValueError("model.weights: a model with random weights has no answers. Leave out `weights`")
        return self


class ServerAnswersConfig(_GeneratedAnswersConfig):
    """Answers of a server with OpenAI's chat API, such as vLLM."""

    by: Literal["request"]
    server: ServerConfig


ShortAnswersConfig = DatasetAnswersConfig | ModelAnswersConfig | ServerAnswersConfig


def collect_short_answers(
    config: ShortAnswersConfig,
    questions: Sequence[str],
    folder: Path,
    *,
    seed: int,
    thinking: ThinkingFormat,
    counts: Counter[str],
) -> list[list[Completion]]:
    """Returns the short answers to each question: those of another data set, or one that is generated.

    Generated answers are saved in `folder` as they arrive, so a rerun generates only the missing ones. Refused
    questions are sent again. `counts` gets the numbers of questions and answers. Raises `UserError` if the saved
    answers are damaged or have other settings, or the data set has none of the questions.
    """
    if isinstance(config, DatasetAnswersConfig):
        return _join_dataset(config, questions, seed=seed, thinking=thinking, counts=counts)
    system: list[Message] = [] if config.system is None else [{"role": "system", "content": config.system}]
    prompts: list[list[Message]] = [[*system, {"role": "user", "content": question}] for question in questions]
    keys = [hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24] for messages in prompts]
    conversations = dict(zip(keys, prompts, strict=True))  # a repeated question is sent once
    settings: dict[str, Any] = config.model_dump(mode="json", exclude={"sampling": {"batch_size"}, "mesh": True})
    settings["seed"] = seed
    if isinstance(config, ModelAnswersConfig):
        fingerprint = quick_fingerprint(resolve_model_folder(config.model.path))  # the model may lie at another path
        settings["model"] = {"weights": config.model.weights, "fingerprint": fingerprint}
        if config.model.template_arguments:
            settings["model"]["template_arguments"] = config.model.template_arguments
    else:
        server = config.server  # its url and limits do not change the answers
        settings["server"] = {"model": server.model} | server.model_dump(
            include={"template_arguments"}, exclude_defaults=True
        )
        if thinking != ThinkingFormat():
            settings["thinking_tags"] = [thinking.before, thinking.after]
    path = folder / "short_answers.jsonl"
    saved = _load_saved_answers(path, settings)
    answers = {key: saved[key] for key in conversations if key in saved}
    missing = {key: messages for key, messages in conversations.items() if key not in saved}
    counts["questions, each asked once"] = len(conversations)
    counts["answered in an earlier try"] = len(answers)
    log_info(f"short answers: {len(answers)} of {len(conversations)} are saved already")
    if missing:
        if isinstance(config, ModelAnswersConfig):
            completions = _generate_missing(config, conversations, missing, seed=seed)
        else:
            completions = request_completions(config.server, missing, config.sampling, seed=seed, thinking=thinking)
        progress = ProgressReporter("short answers", len(conversations), done=len(answers), unit="answer")
        with path.open("a", buffering=1, encoding="utf-8") as file, closing(progress), closing(completions):
            for key, completion in completions:
                answers[key] = completion
                if completion.error is None:
                    is_finished = completion.finish_reason == "stop"
                    file.write(json.dumps({"key": key, "text": completion.text, "finished": is_finished}) + "\n")
                progress.update(len(answers))
    return [[answers[key]] for key in keys]


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


def _load_saved_answers(path: Path, settings: dict[str, Any]) -> dict[str, Completion]:
    """Reads the answers of an earlier run, or starts the file. Its first line holds the settings.

    A last line that is incomplete is removed.
    """
    complete_lines, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if not complete_lines:
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    try:
        saved_settings, *lines = [json.loads(line) for line in complete_lines.split(b"\n")]
        are_answers = all(isinstance(line["text"], str) and isinstance(line["finished"], bool) for line in lines)
        if not (isinstance(saved_settings, dict) and are_answers):
            raise TypeError("a line holds neither settings nor an answer")
        answers = {a["key"]: Completion((), a["text"], "stop" if a["finished"] else "length") for a in lines}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error!r}. Remove the file to generate the answers again.") from None
    if isinstance(saved_model := saved_settings.get("model"), dict):
        saved_model.pop("path", None)  # older files hold it
    changed = [key for key in {**saved_settings, **settings} if saved_settings.get(key) != settings.get(key)]
    if changed:
        problem = f"{path}: holds answers that were generated with other settings ({', '.join(changed)})"
        raise UserError(f"{problem}. Choose another `out`, or remove the file to generate the answers again.")
    os.truncate(path, len(complete_lines) + 1)
    return answers


def _generate_missing(
    config: ModelAnswersConfig, conversations: Conversations, missing: Conversations, *, seed: int
) -> Generator[tuple[str, Completion], None, None]:
    """Yields the answers of the local model to the missing conversations.

    The batches and their seeds are those of all conversations, so the saved answers do not change the missing ones. A
    conversation that the tokenizer or its template cannot encode gets an error.
    """
    mesh = make_mesh(config.mesh)
    source = resolve_model_source(config.model, seed=seed)
    prompts: dict[str, list[int]] = {}
    for key, messages in conversations.items():
        try:
            prompts[key] = source.tokenizer.encode_prompt(messages).ids
        except UserError as error:
            yield key, Completion(error=str(error))
    keys, size = list(prompts), config.sampling.batch_size
    starts = [i for i in range(0, len(keys), size) if not missing.keys().isdisjoint(keys[i : i + size])]
    if not starts:
        return
    with jax.set_mesh(mesh):
        model = source.load(config.compute, mesh)
        for start in starts:
            batch = keys[start : start + size]
            completions = generate(
                model,
                [prompts[key] for key in batch],
                config.sampling,
                stop_token_ids=source.tokenizer.stop_token_ids,
                vocab_size=source.tokenizer.vocab_size,
                seed=int(np.random.SeedSequence((seed, start)).generate_state(1)[0] >> 1),
                mesh=mesh,
            )
            for key, completion in zip(batch, completions, strict=True):
                if key in missing:
                    yield key, replace(completion, text=source.tokenizer.decode(completion.token_ids))
