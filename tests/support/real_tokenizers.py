"""The tokenizers of real models, and how their templates write an answer."""

import json
from pathlib import Path

import pytest
from support.paths import DATA

# The names that DeepSeek-R1-Distill gives to ids of the vocabulary of Qwen2.5, and how its template writes a prompt.
BAR, GAP = "\uff5c", "\u2581"
R1_TOKENS = {
    151643: f"<{BAR}end{GAP}of{GAP}sentence{BAR}>",
    151644: f"<{BAR}User{BAR}>",
    151645: f"<{BAR}Assistant{BAR}>",
    151646: f"<{BAR}begin{GAP}of{GAP}sentence{BAR}>",
    151648: "<think>",
    151649: "</think>",
}
R1_TEMPLATE = (
    (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}{{ 'USER' + m.content }}"
        "{% else %}{{ 'ASSISTANT' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT<think>\\n' }}{% endif %}"
    )
    .replace("USER", R1_TOKENS[151644])
    .replace("ASSISTANT", R1_TOKENS[151645])
)
# The token that ends an answer, and the text that begins it.
END_OF_TURN = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_2": "<|eot_id|>",
    "r1": R1_TOKENS[151643],
}
ASSISTANT_HEADER = {
    "qwen2_5": "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>assistant\n",
    "llama3_2": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "r1": R1_TOKENS[151645],
}


def real_tokenizer(name: str) -> Path:
    folder = DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"the real tokenizers are missing ({folder})")
    return folder


def write_r1_tokenizer(folder: Path) -> Path:
    """Writes the tokenizer of Qwen2.5 with the token names and the template of DeepSeek-R1-Distill-Qwen."""
    source = real_tokenizer("qwen2_5")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        if token["id"] in R1_TOKENS:
            token |= {"content": R1_TOKENS[token["id"]], "special": "think" not in R1_TOKENS[token["id"]]}
    for token_id, content in R1_TOKENS.items():
        config["added_tokens_decoder"][str(token_id)] |= {"content": content, "special": "think" not in content}
    del config["additional_special_tokens"]
    end, begin = R1_TOKENS[151643], R1_TOKENS[151646]
    config |= {"bos_token": begin, "eos_token": end, "pad_token": end, "chat_template": R1_TEMPLATE}
    for name, content in (("tokenizer_config.json", config), ("tokenizer.json", tokenizer)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
