"""Measures generation with transformers on the CPU: one decode step, and whole answers in static batches."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 12  # timed decode steps


def measure_transformers_step(folder: str, rows: int, context: int) -> dict[str, Any]:
    """Returns the median seconds of a greedy decode step of so many rows with so many tokens in the cache."""
    import torch
    from transformers import DynamicCache

    model = _load(folder)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        prompt = torch.randint(0, model.config.vocab_size, (1, context))
        model(prompt, cache=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        token, seconds = prompt[:, -1:].repeat(rows, 1), []
        for step in range(STEPS):
            mask = torch.ones(rows, context + 1 + step, dtype=torch.long)
            start = time.perf_counter()
            logits = model(token, cache=cache, attention_mask=mask, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        assert cache.get_seq_length() == context + STEPS
    return {"seconds": sorted(seconds)[STEPS // 2]}


def measure_transformers_answers(folder: str, prompts_path: str, batch_size: int, limit: int) -> dict[str, Any]:
    """Returns the seconds that greedy answers to the prompts take, and the token ids of each answer.

    The prompts are sorted by length, so that a batch has little padding. One short batch runs before.
    """
    import torch

    model, prompts = _load(folder), json.loads(Path(prompts_path).read_text(encoding="utf-8"))
    stop_ids = model.generation_config.eos_token_id
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[Sequence[int]] = [()] * len(prompts)

    def answer(indices: Sequence[int], limit: int) -> None:
        width = max(len(prompts[i]) for i in indices)
        ids = torch.tensor([[stop_ids[0]] * (width - len(prompts[i])) + prompts[i] for i in indices])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in indices])
        options = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": stop_ids[0]}
        generated = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        for i, tokens in zip(indices, generated, strict=True):
            end = next((at for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
            answers[i] = tokens[:end]

    with torch.inference_mode():
        answer(order[:2], 4)
        start = time.perf_counter()
        for first in range(0, len(order), batch_size):
            answer(order[first : first + batch_size], limit)
        return {"seconds": time.perf_counter() - start, "answers": answers}


def _load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
