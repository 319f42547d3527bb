"""Every loss, and the metrics beside it, is what TRL's DPOTrainer computes from the same log-probs."""

import importlib
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.checkpoints import needs_trl

from thinkpo_jax.data.examples import Example, Segment
from thinkpo_jax.runtime.config import UserError, parse_config
from thinkpo_jax.training import objectives as objectives
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.preference_losses import PREFERENCE_LOSSES, robust_loss, sigmoid_loss
from thinkpo_jax.training.preference_metrics import finalize_metrics

PAIRS = small.pairs(24)
END = 1


class FakeLogprobs:
    """Random log-probs of every answer token of the policy and of the reference, in the forms of both sides."""

    def __init__(self, examples: list[Example]) -> None:
        rng = np.random.default_rng(0)
        self.examples = examples
        self.policy, self.reference = (
            [[-rng.exponential(1.5, len(s.token_ids) - s.answer_start) for s in example] for example in examples]
            for _ in range(2)
        )

    def ours(self, row_length: int = 48) -> tuple[Any, jax.Array]:
        """A batch of packed rows [R, ...] that holds the reference, and the policy's log-probs [R, T]."""
        batches = small.batches(self.examples, steps=1, size=len(self.examples), row_length=row_length)
        for values, example, into in zip(self.reference, self.examples, batches.reference_log_probs, strict=True):
            shortest = min(len(s.token_ids) - s.answer_start for s in example)
            for answer, side in zip(values, into, strict=True):
                head = min(128, shortest)
                side[:] = answer[:head].sum(), answer[head:shortest].sum(), answer[shortest:].sum()
        batch = jax.tree.map(lambda array: jnp.array(array[0]), batches[0])
        logprobs = np.zeros(batch.target_ids.shape, np.float32)
        for row, indices in enumerate(np.asarray(batch.example_ids)):
            answers = [answer for index in indices if index >= 0 for answer in self.policy[index]]
            for number, answer in enumerate(answers, 1):
                segments = np.append(batch.segment_ids[row], [0] * batch.target_ids.shape[1])[batch.loss_positions[row]]
                logprobs[row, segments == number] = answer
        return batch, jnp.array(logprobs)

    def loss_of_trl(self, config: PreferenceConfig) -> tuple[float, dict[str, float]]:
        """TRL's own code, given a model that answers with these log-probs."""
        import torch

        trl: Any = importlib.import_module("trl")  # it exports lazily
        sides = [[(i, side) for i in range(len(self.examples))] for side in (0, 1)]
        order = [*sides[0], *sides[1]]  # chosen answers first
        length = 1 + max(len(self.policy[i][side]) for i, side in order)
        mask, logps, ref = (torch.zeros(len(order), length, dtype=torch.float64) for _ in range(3))
        for row, (i, side) in enumerate(order):
            count = len(self.policy[i][side])
            mask[row, 1 : count + 1] = 1  # a prompt of one token
            logps[row, 1 : count + 1] = torch.tensor(self.policy[i][side])
            ref[row, 1 : count + 1] = torch.tensor(self.reference[i][side])
        shifted = logps[:, 1:]
        outputs = SimpleNamespace(
            log_probs=shifted,
            entropy=torch.zeros_like(shifted),
            mean_logits=torch.zeros_like(shifted),
            is_top1=torch.zeros_like(shifted, dtype=torch.bool),
        )
        alpha = torch.ones_like(ref)
        for i in range(len(self.examples)):
            shortest = min(map(len, self.policy[i]))
            for row in (i, len(self.examples) + i):
                alpha[row, 1 + shortest :] = config.ld_alpha
        reference = (ref * alpha).sum(dim=1)
        half = len(self.examples)
        inputs = {
            "input_ids": torch.zeros(len(order), length, dtype=torch.long),
            "attention_mask": torch.ones(len(order), length, dtype=torch.long),
            "completion_mask": mask,
            "ref_chosen_logps": reference[:half],
            "ref_rejected_logps": reference[half:],
        }
        metrics: defaultdict[str, list[float]] = defaultdict(list)
        trainer: Any = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
            aux_loss_enabled=False,
            ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[config.loss, *(["sft"] if config.nll_weight else [])],
            loss_weights=[1.0, config.nll_weight] if config.nll_weight else [1.0],
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            use_weighting=False,
            _metrics={"train": metrics},
            _total_train_tokens=0,
            _tp_size=1,
        )
        loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
        return float(loss), {name: values[0] for name, values in metrics.items()}


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")  # of torch and TRL at import
@pytest.mark.parametrize(
    "config",
    [
        *({"loss": name} for name in PREFERENCE_LOSSES),
        {"loss": "robust", "label_smoothing": 0.2},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "loss": "ipo"},
        {"loss": "apo_down", "beta": 0.5},
    ],
    ids=str,
)
def test_loss_and_metrics_are_trls(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    preference = PreferenceConfig.model_validate({"beta": 0.1} | config)
    given = FakeLogprobs(PAIRS)
    batch, logprobs = given.ours()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: logprobs)
    sums = make_thinkpo_objective(preference, end_of_turn_id=END)(small.model(), batch)
    expected, metrics = given.loss_of_trl(preference)
    assert float(sums.weight) == len(PAIRS)
    assert float(sums.loss / sums.weight) == pytest.approx(expected, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert float(sums.metrics[name] / sums.weight) == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    for name in ("logps/chosen", "logps/rejected"):
        assert float(sums.metrics[name] / sums.weight) == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")  # of torch and TRL at import
def test_the_nll_term_is_trls_for_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL averages over the tokens of a batch, we over each answer's (arXiv 2404.19733): the same for one pair."""
    given = FakeLogprobs(PAIRS[:1])
    batch, logprobs = given.ours()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: logprobs)
    preference = PreferenceConfig(beta=0.1, nll_weight=0.7)
    sums = make_thinkpo_objective(preference, end_of_turn_id=END)(small.model(), batch)
    assert float(sums.loss / sums.weight) == pytest.approx(given.loss_of_trl(preference)[0], rel=1e-5)


def test_label_smoothing_is_the_mean_over_both_orders() -> None:
    chosen, rejected = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0])
    for share in (0.1, 0.4):
        right, wrong = sigmoid_loss(chosen, rejected, 0.5), sigmoid_loss(rejected, chosen, 0.5)
        smoothed = sigmoid_loss(chosen, rejected, 0.5, label_smoothing=share)
        np.testing.assert_allclose(smoothed, (1 - share) * right + share * wrong, rtol=1e-6)
        # Robust DPO of labels of which `share` are exchanged is on average the loss of the right ones.
        robust = [robust_loss(a, b, 0.5, label_smoothing=share) for a, b in ((chosen, rejected), (rejected, chosen))]
        np.testing.assert_allclose((1 - share) * robust[0] + share * robust[1], right, rtol=1e-5)


def test_an_option_without_effect_is_an_error() -> None:
    for name, loss in PREFERENCE_LOSSES.items():
        given = {"loss": name, "label_smoothing": 0.1}
        if loss.supports_label_smoothing:
            assert parse_config(PreferenceConfig, given, source="x").label_smoothing == 0.1
        else:
            with pytest.raises(UserError, match=f"`label_smoothing` has no effect on the loss '{name}'"):
                parse_config(PreferenceConfig, given, source="x")


def test_metrics_by_region_gap_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain loop over the pairs."""
    rng = np.random.default_rng(3)
    examples = []
    for long, short in ((700, 20), (300, 200), (150, 140), (30, 60), (900, 5)):
        pair = (small.segment(rng, 3, long), small.segment(rng, 3, short))
        for segment, ended in zip(pair, (long != 150, True), strict=True):
            segment.token_ids[segment.token_ids == END] = END + 1
            segment.token_ids[-1] = END if ended else END + 1
        examples.append(pair)
    given = FakeLogprobs(examples)
    batch, logprobs = given.ours(row_length=1024)
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: logprobs)
    beta = 0.05
    sums = make_thinkpo_objective(PreferenceConfig(beta=beta), end_of_turn_id=END)(small.model(), batch)
    found = finalize_metrics({name: float(value / sums.weight) for name, value in sums.metrics.items()})
    regions, margins, gaps, ends = [], [], [], []
    for policy, reference, example in zip(given.policy, given.reference, examples, strict=True):
        ratios = [a - b for a, b in zip(policy, reference, strict=True)]
        shortest = min(map(len, ratios))
        cuts = (slice(0, min(128, shortest)), slice(min(128, shortest), shortest), slice(shortest, None))
        regions.append([beta * (ratios[0][cut].sum() - ratios[1][cut].sum()) for cut in cuts])
        margins.append(beta * (ratios[0].sum() - ratios[1].sum()))
        gaps.append(len(ratios[0]) - len(ratios[1]))
        ends += [values[-1] for values, s in zip(policy, example, strict=True) if s.token_ids[-1] == END]
    means = np.mean(regions, axis=0)
    for name, mean in zip(("first_128", "shared", "tail"), means, strict=True):
        assert found[f"margins/{name}"] == pytest.approx(mean, rel=1e-4), name
    assert found["rewards/margins"] == pytest.approx(means.sum(), rel=1e-4)
    assert found["margins/length_corr"] == pytest.approx(np.corrcoef(margins, gaps)[0, 1], rel=1e-3)
    assert found["logps/end"] == pytest.approx(np.mean(ends), rel=1e-5)
    right = np.array(margins) > 0
    inside = {"gap_below_0": [3], "gap_from_0": [1, 2], "gap_from_512": [0, 4]}
    for name, members in inside.items():
        assert found[f"accuracies/{name}"] == pytest.approx(right[members].mean()), name
    assert "accuracies/gap_from_2048" not in found  # no pair is there
    saturated = np.mean([1 / (1 + math.exp(margin)) < 0.05 for margin in margins])
    assert 0 < saturated < 1
    assert found["saturated"] == pytest.approx(saturated)
    assert not any(name.startswith("_") for name in found)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_no_sum_of_log_probs_is_a_matrix_product(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators those are rounded to bfloat16 by default, which near -4,000 steps by 16."""
    batch, logprobs = FakeLogprobs(PAIRS).ours()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: logprobs)
    config = PreferenceConfig.model_validate({"loss": loss, "ld_alpha": 0.5, "nll_weight": 0.1})
    objective = make_thinkpo_objective(config, end_of_turn_id=END)
    assert "dot_general" not in str(jax.make_jaxpr(lambda batch: objective(small.model(), batch))(batch))


def test_the_tag_that_ends_a_thought_is_found_whatever_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag of two ids and one of one; what looks like it in a prompt, or lies over the end of an answer, is none."""
    rng = np.random.default_rng(4)
    tags = [[50, 51], [60]]
    examples, places = [], []
    for pair in range(6):
        segments = []
        for length in (40 + pair, 12 + pair):
            tokens = rng.integers(0, 40, 4 + length).astype(np.int32)
            tokens[1:3] = 50, 51  # in the prompt
            tokens[-1] = 50  # the answer ends in half of a tag
            segments.append(tokens)
        segments[0][20:22] = 50, 51
        segments[0][30] = 60
        if pair % 2:
            segments[1][8] = 60
        examples.append(tuple(Segment(tokens, 4) for tokens in segments))
        places.append(([[20 - 4, 21 - 4], [30 - 4]], [[8 - 4]] if pair % 2 else []))
    given = FakeLogprobs(examples)
    batch, logprobs = given.ours(row_length=256)
    assert batch.token_ids.shape[0] < len(examples)  # answers do stand beside each other
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: logprobs)
    sums = make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=END, thought_end_token_ids=tags)(
        small.model(), batch
    )
    expected = [
        given.policy[pair][side][place].sum()
        for pair, sides in enumerate(places)
        for side, found in enumerate(sides)
        for place in found
    ]
    assert float(sums.metrics["_thought_end/count"]) == len(expected) == 15
    found = finalize_metrics({name: float(value / sums.weight) for name, value in sums.metrics.items()})
    assert found["logps/thought_end"] == pytest.approx(np.mean(expected), rel=1e-5)
    without = make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=END)(small.model(), batch)
    assert "_thought_end/count" not in without.metrics
