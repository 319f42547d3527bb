"""Asks a model that is being trained a few questions, so that a change of its answers shows during training."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import jax
from jax.sharding import Mesh

from thinkpo_jax.evaluation.benchmarks import Question
from thinkpo_jax.evaluation.evaluate_model import EvaluatedModel, EvaluationConfig, answer_settings, grade_completions
from thinkpo_jax.evaluation.results import QuestionResult, count_answers
from thinkpo_jax.inference.engine import Completion, Request, SamplingConfig
from thinkpo_jax.inference.inference_model import (
    InferenceModel,
    free_device_memory,
    inference_mesh,
    prepare_inference_model,
)
from thinkpo_jax.inference.local_engine import LocalEngine, default_devices
from thinkpo_jax.models.attention.paged import PAGE_SIZE
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.model_folder import ModelSource
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.config import UserError
from thinkpo_jax.runtime.console import log_warning
from thinkpo_jax.runtime.integers import ceil_div
from thinkpo_jax.runtime.processes import is_distributed


class Probe:
    """Asks the same questions of the first benchmark at each call, greedily and with the local engine.

    A call converts the weights to the compute dtype, and frees them before it returns. All calls use the mesh and the
    cache of the first one, so that no program is compiled again. With several processes, all of them call it.
    """

    def __init__(
        self,
        source: ModelSource,
        compute: ComputeConfig,
        config: EvaluationConfig,
        questions: Sequence[Question],
        *,
        max_new_tokens: int | None = None,
    ) -> None:
        """Loads nothing. `source` gives the tokenizer and the shape of the models. The limit is for each answer."""
        limit = max_new_tokens or config.sampling.max_new_tokens
        sampling = SamplingConfig(temperature=0, max_new_tokens=limit, stop=config.sampling.stop)
        self._source, self._compute, self._questions = source, compute, questions
        self._config = config.model_copy(update={"sampling": sampling, "engine": "local", "server": None})
        settings = answer_settings(EvaluatedModel("probe", source), self._config, questions[0])
        self._settings = settings | {"benchmark": config.benchmarks[0].name, "samples": 1}
        self._mesh: Mesh | None = None
        self._max_pages: int | None = None

    def __call__(self, model: Transformer) -> dict[str, float]:
        """Returns `accuracy`, `mean_response_tokens`, `truncation_rate` and `finished_thoughts` of the answers.

        The last one is the share of answers that leave no thought open. An answer that failed is wrong, and counts in
        no other figure. Raises `UserError` if the weights do not fit beside the state of the training.
        """
        completions, benchmark = self._answer(model), self._settings["benchmark"]
        in_order = [completions[question.id] for question in self._questions]
        results = grade_completions(self._settings, self._questions, in_order)
        for error, count in count_answers(results).errors.items():
            log_warning(f"probe on {benchmark}: {count} of {len(results)} answers failed and count as wrong: {error}")
        return _summarize(results)

    def _answer(self, model: Transformer) -> dict[str, Completion]:
        """Returns the completion of each question by its id. The weights of the engine are freed on return."""
        requests = [Request(question.id, question.messages) for question in self._questions]
        with jax.set_mesh(None):  # the mesh of the training may have its devices in another order
            prepared = self._prepare(model)
        engine = LocalEngine(self._source, self._compute, self._config.local, model=prepared)
        with jax.set_mesh(prepared.mesh):
            return dict(engine.generate(requests, self._config.sampling, seed=0))

    def _prepare(self, model: Transformer) -> InferenceModel:
        tokenizer, cache_memory = self._source.tokenizer, self._config.local.cache_memory
        if self._mesh is None:
            self._mesh = self._choose_mesh()
        prepared = prepare_inference_model(
            model, self._mesh, vocab_size=tokenizer.vocab_size, cache_memory=cache_memory
        )
        if self._max_pages is None:
            self._max_pages = min(prepared.max_pages, self._count_pages(prepared.num_groups))
        return replace(prepared, max_pages=self._max_pages)

    def _choose_mesh(self) -> Mesh:
        # Arrays move between processes only if both meshes have all devices.
        devices = jax.devices() if is_distributed() else default_devices()
        try:
            memory = free_device_memory(jax.local_devices()[0])
            return inference_mesh(self._source.architecture, self._compute, devices, memory)
        except UserError as error:
            raise UserError(f"probe: beside the state of the training, {error} Or remove `probe`.") from None

    def _count_pages(self, num_groups: int) -> int:
        """Returns the pages that a group of devices needs if all answers are as long as they may be."""
        prompts = (self._source.tokenizer.encode_prompt(question.messages).ids for question in self._questions)
        longest = max(map(len, prompts)) + self._config.sampling.max_new_tokens
        pages = ceil_div(min(longest, self._source.architecture.max_positions), PAGE_SIZE)
        return 1 + ceil_div(len(self._questions), num_groups) * (pages + 1)  # page 0, and one to spare for each answer


def _summarize(results: Sequence[QuestionResult]) -> dict[str, float]:
    samples = [sample for result in results for sample in result.samples]
    figures = {"accuracy": fmean(sample.correct for sample in samples)}
    if answered := [sample for sample in samples if sample.error is None]:
        figures["mean_response_tokens"] = fmean(sample.tokens for sample in answered)
        figures["truncation_rate"] = fmean(sample.truncated for sample in answered)
        figures["finished_thoughts"] = fmean(not sample.unfinished_thought for sample in answered)
    return figures
