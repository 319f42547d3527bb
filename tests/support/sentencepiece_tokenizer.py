"""A tokenizer like those that sentencepiece makes for Llama 2, TinyLlama and Mistral."""

import json
from pathlib import Path
from typing import Any

TEMPLATES = {
    "zephyr": (  # of TinyLlama-Chat
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "special": (  # a special token ends the prompt
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}<|answer|>"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|answer|>")
TEXTS = (
    "Hello there, what is the sum of two and three? The answer is 5. Let me think about it: two plus three.",
    "<think>\nThe sum of 2 and 3 is 5.\n</think>\n\nHello, the answer is \\boxed{5}. <|user|> [INST] [/INST]",
)


def sentencepiece_tokenizer(
    folder: Path, *, prefix: str = "each", template: str = "zephyr", byte_fallback: bool = True
) -> Path:
    """Writes a tokenizer folder. Spaces are written as "▁", and a text begins with one.

    With prefix "each" each text between special tokens begins with it (a `Prepend` normalizer, as in Llama 2). With
    "first" only the whole text does (a `Metaspace` pre-tokenizer, as in later conversions). Without `byte_fallback`
    an unknown character has no tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else ["\n"]
    vocabulary = [*SPECIAL_TOKENS, *fallback, *(token for token in model["vocab"] if token not in fallback)]
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    if prefix == "each":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"legacy": False, "chat_template": TEMPLATES[template]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
