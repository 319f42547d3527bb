"""Models of every family and size have the published number of parameters."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from thinkpo_jax.models.architecture import read_architecture
from thinkpo_jax.models.weight_mapping import expected_tensor_shapes

QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6}
QWEN2_SMALL = {"num_key_value_heads": 2, "vocab_size": 151_936}
QWEN2_LARGE = {"num_key_value_heads": 8, "vocab_size": 152_064}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
LLAMA = {"model_type": "llama", "rope_theta": 5e5, "num_key_value_heads": 8, "vocab_size": 128_256}
SMOLLM2 = {"model_type": "llama", "rope_theta": 1e5, "vocab_size": 49_152}
TIED = {"tie_word_embeddings": True}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# (fields of the family, values of FIELDS, other fields, published number of parameters)
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], dict[str, Any], int]] = {
    "Qwen2.5-0.5B": (QWEN2, (896, 24, 14, 4864), TIED | QWEN2_SMALL, 494_032_768),
    "Qwen2.5-1.5B": (QWEN2, (1536, 28, 12, 8960), TIED | QWEN2_SMALL, 1_543_714_304),
    "Qwen2.5-3B": (QWEN2, (2048, 36, 16, 11_008), TIED | QWEN2_SMALL, 3_085_938_688),
    "Qwen2.5-7B": (QWEN2, (3584, 28, 28, 18_944), {"num_key_value_heads": 4, "vocab_size": 152_064}, 7_615_616_512),
    "Qwen2.5-14B": (QWEN2, (5120, 48, 40, 13_824), QWEN2_LARGE, 14_770_033_664),
    "Qwen2.5-32B": (QWEN2, (5120, 64, 40, 27_648), QWEN2_LARGE, 32_763_876_352),
    "Qwen2.5-72B": (QWEN2, (8192, 80, 64, 29_568), QWEN2_LARGE, 72_706_203_648),
    "R1-Distill-Qwen-1.5B": (
        QWEN2, (1536, 28, 12, 8960), QWEN2_SMALL, 1_777_088_000,
    ),
    "Qwen3-0.6B": (QWEN3, (1024, 28, 16, 3072), TIED, 596_049_920),
    "Qwen3-1.7B": (QWEN3, (2048, 28, 16, 6144), TIED, 1_720_574_976),
    "Qwen3-4B": (QWEN3, (2560, 36, 32, 9728), TIED, 4_022_468_096),
    "Qwen3-8B": (QWEN3, (4096, 36, 32, 12_288), {}, 8_190_735_360),
    "Qwen3-14B": (QWEN3, (5120, 40, 40, 17_408), {}, 14_768_307_200),
    "Qwen3-32B": (QWEN3, (5120, 64, 64, 25_600), {}, 32_762_123_264),
    "Llama-3.1-8B": (LLAMA, (4096, 32, 32, 14_336), {}, 8_030_261_248),
    "Llama-3.1-70B": (LLAMA, (8192, 80, 64, 28_672), {}, 70_553_706_496),
    "Llama-3.2-1B": (LLAMA, (2048, 16, 32, 8192), TIED, 1_235_814_400),
    "Llama-3.2-3B": (LLAMA, (3072, 28, 24, 8192), TIED, 3_212_749_824),
    "SmolLM2-135M": (SMOLLM2, (576, 30, 9, 1536), TIED | {"num_key_value_heads": 3}, 134_515_008),
    "SmolLM2-360M": (SMOLLM2, (960, 32, 15, 2560), TIED | {"num_key_value_heads": 5}, 361_821_120),
    "SmolLM2-1.7B": (SMOLLM2, (2048, 24, 32, 8192), TIED | {"num_key_value_heads": 32}, 1_711_376_384),
}  # fmt: skip
# The other R1 distillations have the shapes of Qwen2.5-7B, -14B and -32B, and of Llama-3.1-8B and -70B.


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_number(name: str, tmp_path: Path) -> None:
    family, sizes, other_fields, expected = PUBLISHED[name]
    config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "tie_word_embeddings": False}
    raw = config | family | dict(zip(FIELDS, sizes, strict=True)) | other_fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shapes = expected_tensor_shapes(read_architecture(tmp_path))
    assert sum(math.prod(shape) for shape in shapes.values()) == expected
