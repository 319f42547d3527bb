"""Token ids are those of tokenizer.json, and tokenizers that write a space before a text lose nothing."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import smollm2_folder, smollm2_missing
from support.paths import DATA
from support.real_tokenizers import real_tokenizer
from support.selection import combinations, exhaustive
from support.sentencepiece_tokenizer import TEMPLATES, sentencepiece_tokenizer
from tokenizers import AddedToken, Tokenizer

from thinkpo_jax.data import tokenizer_files
from thinkpo_jax.data.chat_tokenizer import ChatTokenizer, Message
from thinkpo_jax.data.tokenizer_files import load_tokenizer
from thinkpo_jax.models.model_folder import resolve_model_folder
from thinkpo_jax.runtime.config import UserError

QUESTION: list[Message] = [{"role": "user", "content": "Hello there, what is the sum?"}]
MODEL_TYPES = {"qwen2_5": "qwen2", "qwen3": "qwen3", "llama3_2": "llama", "smollm2": "llama"}
CLASSES = (
    "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast",
    "UnknownTokenizer", "T5Tokenizer",
)  # fmt: skip


@cache
def real_texts() -> list[str]:
    lines = (DATA / "pairs" / "math500_pairs.jsonl").read_text(encoding="utf-8").split("\n")[:20]
    return [json.loads(line)["long"][:4000] for line in lines] + ["don't DON'T  12345 é ﬁ 六 🙂\t\u2028\n\n x"]


@cache
def ids_of_file(path: Path) -> list[list[int]]:
    backend = Tokenizer.from_file(str(path))
    return [backend.encode(text, add_special_tokens=False).ids for text in real_texts()]


def with_settings(source: Path, folder: Path, model_type: str, **settings: Any) -> Path:
    """Copies tokenizer.json, and changes tokenizer_config.json."""
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def _is_short(name: str, tokenizer_class: str) -> bool:
    return (name, tokenizer_class) == ("qwen3", "GPT2Tokenizer")


@pytest.mark.parametrize(
    ("name", "tokenizer_class"), combinations(("qwen2_5", "qwen3", "llama3_2"), CLASSES, short=_is_short)
)
def test_ids_are_those_of_tokenizer_json_under_any_class(
    name: str, tokenizer_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = real_tokenizer(name)
    folder = with_settings(source, tmp_path, MODEL_TYPES[name], tokenizer_class=tokenizer_class)
    tokenizer, expected = load_tokenizer(folder), ids_of_file(source / "tokenizer.json")
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in real_texts()] == expected
    assert len(tokenizer) == Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    assert tokenizer.eos_token == json.loads((source / "tokenizer_config.json").read_text())["eos_token"]
    if _is_short(name, tokenizer_class):
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: {folder}: the token ids are those of tokenizer.json")
        assert tokenizer_class in warning
        assert "pre_tokenizer" in warning


def test_no_warning_for_the_class_that_belongs_to_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    load_tokenizer(real_tokenizer("qwen3"))
    assert capsys.readouterr().err == ""


@exhaustive
@pytest.mark.skipif(bool(smollm2_missing()), reason=smollm2_missing())
def test_smollm2_keeps_its_ids_under_the_class_of_its_hub_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")
    tokenizer = load_tokenizer(with_settings(source, tmp_path, "llama", tokenizer_class="GPT2Tokenizer"))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in real_texts()]
    assert ids == ids_of_file(source / "tokenizer.json")


def test_settings_of_added_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken("<keep>", normalized=False, rstrip=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    number = backend.token_to_id("<keep>")
    changed = {"content": "<keep>", "rstrip": True, "lstrip": True, "normalized": True, "single_word": False}
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"added_tokens_decoder": {str(number): {**changed, "special": False}}}
    path.write_text(json.dumps(config | {"pad_token": "<new>"}))
    tokenizer = load_tokenizer(tmp_path)
    expected = backend.encode("a <keep>  b", add_special_tokens=False).ids
    assert tokenizer("a <keep>  b", add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.convert_tokens_to_ids("<new>") == len(tokenizer) - 1  # only tokenizer_config.json names it


def test_a_vocabulary_with_merges_is_enough(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert load_tokenizer(tmp_path)("abab")["input_ids"] == [3, 3]


def test_a_tokenizer_that_needs_a_conversion_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match=r"save_pretrained.*which writes tokenizer.json"):
        load_tokenizer(tmp_path)


ANSWERS = ("Hello, the sum is 5.", "\n\nHello é六", "<think>\nthe sum\n</think>\n\nHello", "a  b\n c ")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prefix", ["each", "first"])
def test_an_answer_has_the_ids_of_the_whole_conversation(prefix: str, template: str, tmp_path: Path) -> None:
    chat = ChatTokenizer.from_folder(sentencepiece_tokenizer(tmp_path, prefix=prefix, template=template))
    prompt = chat.encode_prompt(QUESTION)
    for answer in ANSWERS:
        ids = chat.encode_answer(prompt, answer)[:-1]
        whole = chat.tokenizer.apply_chat_template(
            [*QUESTION, {"role": "assistant", "content": answer}], tokenize=False
        )
        expected = chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
        num_prompt = len(prompt.ids)
        assert expected[: num_prompt + len(ids)] == prompt.ids + ids
        assert chat.decode(ids) == answer


def test_a_tag_that_the_tokenizer_cannot_write_has_no_ids() -> None:
    chat = ChatTokenizer.from_folder(resolve_model_folder("builtin:miniature"))
    assert chat.thought_end_token_ids() == [[], []]


def test_tags_are_found_at_the_start_of_a_line(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_folder(sentencepiece_tokenizer(tmp_path))
    assert not any(
        token.startswith("▁")
        for ids in chat.thought_end_token_ids()
        for token in chat.tokenizer.convert_ids_to_tokens(ids)
    )


@pytest.mark.parametrize("prefix", ["each", "first"])
def test_a_real_loss_is_still_found(prefix: str, tmp_path: Path) -> None:
    folder = sentencepiece_tokenizer(tmp_path, prefix=prefix, byte_fallback=False)
    chat = ChatTokenizer.from_folder(folder)
    prompt = chat.encode_prompt(QUESTION)
    with pytest.raises(UserError, match=r"'六 the' at character 7 comes back as .* The vocabulary has no token for it"):
        chat.encode_answer(prompt, "Hello 六 the")
    with pytest.raises(
        UserError, match=r"'▁the' at character 6 comes back as ' the'.*writes a space as this character"
    ):
        chat.encode_answer(prompt, "Hello▁the")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "num_labels": 10**12},
        {"model_type": "qwen2", "num_hidden_layers": 10**12},
        {"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 10**12}},
        {"model_type": ["qwen2"]},
        {"model_type": "unknown"},
    ],
)
def test_sizes_in_config_json_do_not_matter_to_the_tokenizer(config: dict[str, Any], tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ids_of_file(tmp_path / "tokenizer.json")[0]
    assert load_tokenizer(tmp_path)(real_texts()[0], add_special_tokens=False)["input_ids"] == expected


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentencepiece_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENS", 10)
    with pytest.raises(UserError, match=r"expected at most 10 tokens, .*, found .*Use the original tokenizer"):
        load_tokenizer(tmp_path)


def test_deep_nesting_in_the_files_of_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for name in ("tokenizer_config.json", "tokenizer.json"):
        sentencepiece_tokenizer(tmp_path)
        (tmp_path / name).write_text(deep)
        with pytest.raises(UserError, match="no usable tokenizer"):
            load_tokenizer(tmp_path)
