"""Compares every loss and its metrics with what TRL's DPOTrainer computes from the same log-probs."""

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
from thinkpo_jax.training import objectives
from thinkpo_jax.training.objectives import PreferenceConfig, make_thinkpo_objective
from thinkpo_jax.training.preference_losses import PREFERENCE_LOSSES, robust_loss, sigmoid_loss
from thinkpo_jax.training.preference_metrics import finalize_metrics

PAIRS = small.pairs(24)
END_OF_TURN_ID = 1


class FakeLogProbs:
    """Random log-probs of all answer tokens for policy and reference, in the layouts of this package and of TRL."""

    def __init__(self, examples: list[Example]) -> None:
        rng = np.random.default_rng(0)
        self.examples = examples
        self.policy, self.reference = (
            [[-rng.exponential(1.5, len(s.token_ids) - s.answer_start) for s in example] for example in examples]
            for _ in range(2)
        )

    def as_batch(self, row_length: int = 48) -> tuple[Any, jax.Array]:
        """Returns a batch of packed rows [R, ...] with the reference, and the policy's log-probs [R, T]."""
        batches = small.batches(self.examples, steps=1, size=len(self.examples), row_length=row_length)
        for answers, example, target in zip(self.reference, self.examples, batches.reference_log_probs, strict=True):
            shortest = min(len(s.token_ids) - s.answer_start for s in example)
            for answer, region_sums in zip(answers, target, strict=True):
                head = min(128, shortest)
                region_sums[:] = answer[:head].sum(), answer[head:shortest].sum(), answer[shortest:].sum()
        batch = jax.tree.map(lambda array: jnp.array(array[0]), batches[0])
        log_probs = np.zeros(batch.target_ids.shape, np.float32)
        for row, indices in enumerate(np.asarray(batch.example_ids)):
            answers = [answer for index in indices if index >= 0 for answer in self.policy[index]]
            for number, answer in enumerate(answers, 1):
                segments = np.append(batch.segment_ids[row], [0] * batch.target_ids.shape[1])[batch.loss_positions[row]]
                log_probs[row, segments == number] = answer
        return batch, jnp.array(log_probs)

    def trl_loss(self, config: PreferenceConfig) -> tuple[float, dict[str, float]]:
        """Returns the loss and metrics of TRL's own code for a model with these log-probs."""
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
@pytest.mark.filterwarnings("ignore")  # torch and TRL warn at import
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
def test_loss_and_metrics_equal_trl(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    preference = PreferenceConfig.model_validate({"beta": 0.1} | config)
    fake = FakeLogProbs(PAIRS)
    batch, log_probs = fake.as_batch()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: log_probs)
    sums = make_thinkpo_objective(preference, end_of_turn_id=END_OF_TURN_ID)(small.model(), batch)
    expected, metrics = fake.trl_loss(preference)
    assert float(sums.weight) == len(PAIRS)
    assert float(sums.loss / sums.weight) == pytest.approx(expected, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert float(sums.metrics[name] / sums.weight) == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    for name in ("logps/chosen", "logps/rejected"):
        assert float(sums.metrics[name] / sums.weight) == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")  # torch and TRL warn at import
def test_the_nll_term_equals_trl_for_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL averages over the tokens of a batch, this package over those of each answer (arXiv 2404.19733).

    Both averages are the same for one pair.
    """
    fake = FakeLogProbs(PAIRS[:1])
    batch, log_probs = fake.as_batch()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: log_probs)
    preference = PreferenceConfig(beta=0.1, nll_weight=0.7)
    sums = make_thinkpo_objective(preference, end_of_turn_id=END_OF_TURN_ID)(small.model(), batch)
    assert float(sums.loss / sums.weight) == pytest.approx(fake.trl_loss(preference)[0], rel=1e-5)


def test_label_smoothing_averages_the_loss_over_both_orders() -> None:
    chosen, rejected = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0])
    for fraction in (0.1, 0.4):
        right, wrong = sigmoid_loss(chosen, rejected, 0.5), sigmoid_loss(rejected, chosen, 0.5)
        smoothed = sigmoid_loss(chosen, rejected, 0.5, label_smoothing=fraction)
        np.testing.assert_allclose(smoothed, (1 - fraction) * right + fraction * wrong, rtol=1e-6)
        # If `fraction` of the labels are swapped, the robust loss is on average the loss of the correct labels.
        robust = [robust_loss(a, b, 0.5, label_smoothing=fraction) for a, b in ((chosen, rejected), (rejected, chosen))]
        np.testing.assert_allclose((1 - fraction) * robust[0] + fraction * robust[1], right, rtol=1e-5)


def test_label_smoothing_is_an_error_for_losses_that_ignore_it() -> None:
    for name, loss in PREFERENCE_LOSSES.items():
        options = {"loss": name, "label_smoothing": 0.1}
        if loss.supports_label_smoothing:
            assert parse_config(PreferenceConfig, options, source="x").label_smoothing == 0.1
        else:
            with pytest.raises(UserError, match=f"`label_smoothing` has no effect on the loss '{name}'"):
                parse_config(PreferenceConfig, options, source="x")


def test_metrics_by_region_and_length_gap_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the metrics of regions, length gaps and end tokens with a plain loop over the pairs."""
    rng = np.random.default_rng(3)
    examples = []
    for long, short in ((700, 20), (300, 200), (150, 140), (30, 60), (900, 5)):
        pair = (small.segment(rng, 3, long), small.segment(rng, 3, short))
        for segment, has_end in zip(pair, (long != 150, True), strict=True):
            segment.token_ids[segment.token_ids == END_OF_TURN_ID] = END_OF_TURN_ID + 1
            segment.token_ids[-1] = END_OF_TURN_ID if has_end else END_OF_TURN_ID + 1
        examples.append(pair)
    fake = FakeLogProbs(examples)
    batch, log_probs = fake.as_batch(row_length=1024)
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: log_probs)
    beta = 0.05
    sums = make_thinkpo_objective(PreferenceConfig(beta=beta), end_of_turn_id=END_OF_TURN_ID)(small.model(), batch)
    metrics = finalize_metrics({name: float(value / sums.weight) for name, value in sums.metrics.items()})
    regions, margins, gaps, ends = [], [], [], []
    for policy, reference, example in zip(fake.policy, fake.reference, examples, strict=True):
        ratios = [a - b for a, b in zip(policy, reference, strict=True)]
        shortest = min(map(len, ratios))
        cuts = (slice(0, min(128, shortest)), slice(min(128, shortest), shortest), slice(shortest, None))
        regions.append([beta * (ratios[0][cut].sum() - ratios[1][cut].sum()) for cut in cuts])
        margins.append(beta * (ratios[0].sum() - ratios[1].sum()))
        gaps.append(len(ratios[0]) - len(ratios[1]))
        ends += [values[-1] for values, s in zip(policy, example, strict=True) if s.token_ids[-1] == END_OF_TURN_ID]
    means = np.mean(regions, axis=0)
    for name, mean in zip(("first_128", "shared", "tail"), means, strict=True):
        assert metrics[f"margins/{name}"] == pytest.approx(mean, rel=1e-4), name
    assert metrics["rewards/margins"] == pytest.approx(means.sum(), rel=1e-4)
    assert metrics["margins/length_corr"] == pytest.approx(np.corrcoef(margins, gaps)[0, 1], rel=1e-3)
    assert metrics["logps/end"] == pytest.approx(np.mean(ends), rel=1e-5)
    right = np.array(margins) > 0
    pairs_by_gap = {"gap_below_0": [3], "gap_from_0": [1, 2], "gap_from_512": [0, 4]}
    for name, members in pairs_by_gap.items():
        assert metrics[f"accuracies/{name}"] == pytest.approx(right[members].mean()), name
    assert "accuracies/gap_from_2048" not in metrics  # no pair has such a gap
    saturated = np.mean([1 / (1 + math.exp(margin)) < 0.05 for margin in margins])
    assert 0 < saturated < 1
    assert metrics["saturated"] == pytest.approx(saturated)
    assert not any(name.startswith("_") for name in metrics)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_sums_of_log_probs_do_not_use_matrix_products(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerators round matrix products to bfloat16 by default. Near -4,000, bfloat16 moves in steps of 16."""
    batch, log_probs = FakeLogProbs(PAIRS).as_batch()
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: log_probs)
    config = PreferenceConfig.model_validate({"loss": loss, "ld_alpha": 0.5, "nll_weight": 0.1})
    objective = make_thinkpo_objective(config, end_of_turn_id=END_OF_TURN_ID)
    assert "dot_general" not in str(jax.make_jaxpr(lambda batch: objective(small.model(), batch))(batch))


def test_thought_end_tags_are_found_only_inside_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests tags of two tokens and of one token.

    A tag in a prompt does not count, nor does one that is cut off at the end of an answer.
    """
    rng = np.random.default_rng(4)
    tags = [[50, 51], [60]]
    examples, tag_positions = [], []
    for pair in range(6):
        segments = []
        for length in (40 + pair, 12 + pair):
            tokens = rng.integers(0, 40, 4 + length).astype(np.int32)
            tokens[1:3] = 50, 51  # in the prompt
            tokens[-1] = 50  # the answer ends with the first half of a tag
            segments.append(tokens)
        segments[0][20:22] = 50, 51
        segments[0][30] = 60
        if pair % 2:
            segments[1][8] = 60
        examples.append(tuple(Segment(tokens, 4) for tokens in segments))
        tag_positions.append(([[20 - 4, 21 - 4], [30 - 4]], [[8 - 4]] if pair % 2 else []))
    fake = FakeLogProbs(examples)
    batch, log_probs = fake.as_batch(row_length=256)
    assert batch.token_ids.shape[0] < len(examples)  # some rows hold several pairs
    monkeypatch.setattr(objectives, "answer_token_log_probs", lambda model, batch: log_probs)
    sums = make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=END_OF_TURN_ID, thought_end_token_ids=tags)(
        small.model(), batch
    )
    expected = [
        fake.policy[pair][side][positions].sum()
        for pair, sides in enumerate(tag_positions)
        for side, tags_of_answer in enumerate(sides)
        for positions in tags_of_answer
    ]
    assert float(sums.metrics["_thought_end/count"]) == len(expected) == 15
    metrics = finalize_metrics({name: float(value / sums.weight) for name, value in sums.metrics.items()})
    assert metrics["logps/thought_end"] == pytest.approx(np.mean(expected), rel=1e-5)
    without = make_thinkpo_objective(PreferenceConfig(), end_of_turn_id=END_OF_TURN_ID)(small.model(), batch)
    assert "_thought_end/count" not in without.metrics
