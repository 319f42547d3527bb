"""Compares FLOP counts with the formulas of the literature and with XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support import small

from thinkpo_jax.data.batches import BatchWork
from thinkpo_jax.models.attention.blockwise import TokenPositions
from thinkpo_jax.models.compute_config import ComputeConfig
from thinkpo_jax.models.rope import build_rope
from thinkpo_jax.models.transformer import Transformer
from thinkpo_jax.runtime.devices import peak_flops
from thinkpo_jax.training.throughput import count_update_flops, throughput_metrics

BFLOAT16 = ComputeConfig(dtype="bfloat16")


def test_the_work_of_a_batch_equals_a_plain_loop() -> None:
    examples = small.pairs(20)
    batches = small.batches(examples, steps=1, size=20)
    segments = [segment for example in examples for segment in example]
    work = batches.count_work(batches[0])
    assert work.tokens == sum(len(segment.token_ids) for segment in segments)
    assert work.loss_tokens == sum(len(segment.token_ids) - segment.answer_start for segment in segments)
    assert work.attention_pairs == sum(n * (n + 1) // 2 for n in (len(segment.token_ids) for segment in segments))


@pytest.mark.parametrize(
    ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "length", "gigaflops"),
    [
        (24, 896, 4864, 14, 2, 64, 151_936, 8192, 4.0),
        (28, 3584, 18_944, 28, 4, 128, 152_064, 8192, 47.4),
        (28, 3584, 18_944, 28, 4, 128, 152_064, 32_768, 62.2),
        (32, 4096, 14_336, 32, 8, 128, 128_256, 8192, 51.5),
    ],
)
def test_flops_per_token_of_known_models(
    layers: int, embed: int, mlp: int, heads: int, kv_heads: int, head_dim: int, vocab: int, length: int,
    gigaflops: float,
) -> None:  # fmt: skip
    """The formula is 6 (layers + head) + 6 L N H T.

    The models are Qwen2.5 0.5B at 8k, Qwen2.5 7B at 8k and 32k, and Llama 3.1 8B at 8k.
    """
    arch = dataclasses.replace(
        small.ARCH,
        num_layers=layers,
        hidden_size=embed,
        mlp_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
    )
    one_row = BatchWork(tokens=length, attention_pairs=length * (length + 1) // 2, loss_tokens=length)
    flops = count_update_flops(arch, BFLOAT16, one_row)
    assert flops.model / length / 1e9 == pytest.approx(gigaflops, abs=0.06)
    # Remat computes the layers' forward pass a second time. The logits are always computed twice.
    full = count_update_flops(arch, ComputeConfig(dtype="bfloat16", remat="full"), one_row)
    scores = 2 * layers * heads * head_dim * one_row.attention_pairs
    assert flops.hardware - flops.model == pytest.approx(2 * embed * vocab * length + scores)
    assert full.hardware - scores == pytest.approx(full.model * 4 / 3)
    hardware = {name: count_update_flops(arch, ComputeConfig.model_validate({"remat": name}), one_row).hardware
                for name in ("none", "projections", "attention")}  # fmt: skip
    assert hardware["projections"] == hardware["none"] == flops.hardware
    assert full.hardware - hardware["attention"] == pytest.approx(2 * scores)


def test_forward_flops_equal_the_count_of_xla() -> None:
    """Tests one layer with all attention pairs, because XLA also counts masked products. All tokens are loss tokens."""
    arch = dataclasses.replace(
        small.ARCH,
        num_layers=1,
        hidden_size=256,
        mlp_size=512,
        head_dim=64,
        rope=build_rope({"rope_theta": 1e4}, 64),
    )
    model, length = Transformer(arch, small.FLOAT32, jax.random.key(0)), 128
    tokens = jnp.zeros((1, length), jnp.int32)
    positions = TokenPositions(tokens + 1, jnp.arange(length)[None])

    def forward(model: Transformer) -> jax.Array:
        return model(tokens, positions) @ model.lm_head()

    cost = jax.jit(forward).lower(model).compile().cost_analysis()
    assert cost is not None
    counted = count_update_flops(arch, small.FLOAT32, BatchWork(length, length * length, length)).model / 3
    assert counted == pytest.approx(cost["flops"], rel=0.1)  # the formula leaves out norms, RoPE and the softmax


def test_mfu_is_reported_only_if_the_peak_of_the_device_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "cpu": None,
    }
    assert {kind: peak_flops(kind) for kind in kinds} == kinds
    batches = small.batches(small.pairs(20), steps=1, size=20)
    work, slots = batches.count_work(batches[0]), batches.tokens_per_update()
    metrics = throughput_metrics(work, slots, small.ARCH, BFLOAT16, 2.0)
    assert "mfu" not in metrics
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / 2, abs=0.1)
    assert metrics["padded_tokens_per_second"] == pytest.approx(slots / 2)
    assert metrics["packing_efficiency"] == pytest.approx(metrics["tokens"] / slots, abs=1e-4)
    monkeypatch.setattr("thinkpo_jax.training.throughput.peak_flops", lambda _: 1e6)
    metrics = throughput_metrics(work, slots, small.ARCH, BFLOAT16, 2.0)
    flops = count_update_flops(small.ARCH, BFLOAT16, work)
    available = 1e6 * len(jax.devices()) * 2.0
    assert metrics["mfu"] == pytest.approx(flops.model / available, abs=1e-4)
    assert metrics["hfu"] == pytest.approx(flops.hardware / available, abs=1e-4)
    assert "mfu" not in throughput_metrics(work, slots, small.ARCH, small.FLOAT32, 2.0)
