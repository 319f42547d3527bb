"""Finds training questions that occur in a benchmark."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Tokens = tuple[str, ...]
CONTAMINATION_NGRAM = 13  # tokens in a row that two questions share if one is a copy of the other
MIN_MATCH_TOKENS = 4  # a shorter question ("Compute 2+3") matches only a question that equals it
# Drawings, typesetting commands and AIME's closing phrase occur in unrelated questions.
_IGNORED_TEXT = re.compile(
    r"\[asy\].*?\[/asy\]|\\(?:left|right)(?![a-z])|\\[^a-z]|"
    r"where\W+\w\W+and\W+\w\W+are\s+(?:relatively\s+prime|coprime)\s+positive\s+integers",
    re.DOTALL,
)
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+|[^\w\s$\\{}.,;:!?'\"`]")


@dataclass(frozen=True)
class ContaminationMatch:
    """Question number `index` and a held-out question of a benchmark share the tokens in `shared`."""

    index: int
    benchmark: str
    held_out: str
    shared: str


def find_contamination(
    questions: Sequence[str], held_out: Mapping[str, Sequence[str]], *, ngram: int
) -> list[ContaminationMatch]:
    """Returns the pairs of a question and a held-out question that share text, in the order of `questions`.

    A pair matches if one question contains the other, or if both contain the same `ngram` tokens (at least 4) in a row.
    Tokens are lower-cased words, numbers, LaTeX commands and operators. The keys of `held_out` are benchmark names.
    With 13 tokens, copies with other numbers or names are found. With 8, most matches are common phrases, such as "how
    many hours a week does he spend".
    """
    known = [(benchmark, text) for benchmark, texts in held_out.items() for text in texts]
    question_tokens = [_tokenize(text) for text in questions]
    held_out_tokens = [_tokenize(text) for _, text in known]
    shared = {(i, j): question_tokens[i] for i, j in _find_contained(question_tokens, held_out_tokens)}
    shared |= {(i, j): held_out_tokens[j] for j, i in _find_contained(held_out_tokens, question_tokens)}
    held_out_by_ngram: defaultdict[Tokens, set[int]] = defaultdict(set)
    for j, run in _ngrams(held_out_tokens, ngram):
        held_out_by_ngram[run].add(j)
    for i, run in _ngrams(question_tokens, ngram):
        for j in held_out_by_ngram.get(run, ()):
            shared.setdefault((i, j), run)
    same = {(i, j) for i, j in shared if question_tokens[i] == held_out_tokens[j]}
    texts = {key: "the whole question" if key in same else " ".join(run) for key, run in shared.items()}
    return [ContaminationMatch(i, *known[j], texts[i, j]) for i, j in sorted(shared)]


def _tokenize(text: str) -> Tokens:
    plain = unicodedata.normalize("NFKC", text).lower().replace("\\dfrac", "\\frac")
    return tuple(_TOKEN.findall(_IGNORED_TEXT.sub(" ", plain)))


def _ngrams(texts: Sequence[Tokens], size: int) -> Iterator[tuple[int, Tokens]]:
    for index, tokens in enumerate(texts):
        yield from ((index, tokens[start : start + size]) for start in range(len(tokens) - size + 1))


def _find_contained(parts: Sequence[Tokens], texts: Sequence[Tokens]) -> Iterator[tuple[int, int]]:
    """Yields (part, text) indices if the text contains the part. A part of under `MIN_MATCH_TOKENS` must equal it."""
    parts_by_start: defaultdict[Tokens, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        parts_by_start[part[:MIN_MATCH_TOKENS]] += [i] if part else []
    for j, text in enumerate(texts):
        for start in range(max(1, len(text) - MIN_MATCH_TOKENS + 1)):
            candidates = parts_by_start.get(text[start : start + MIN_MATCH_TOKENS], ())
            yield from ((i, j) for i in candidates if text[start : start + len(parts[i])] == parts[i])
