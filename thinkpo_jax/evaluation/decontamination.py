"""Finds questions that occur in a benchmark. `pairs` and `train --check` both use it."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Tokens = tuple[str, ...]

MIN_MATCH_TOKENS = 4  # tokens; a question of fewer ("Compute 2+3") is found only where it equals the other
# Drawings, the marks of mathematics, and how AIME's questions end: shared by questions that have nothing in common.
_UNSEEN = re.compile(
    r"\[asy\].*?\[/asy\]|\\(?:left|right)(?![a-z])|\\[^a-z]|"
    r"where\W+\w\W+and\W+\w\W+are\s+(?:relatively\s+prime|coprime)\s+positive\s+integers",
    re.DOTALL,
)
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+|[^\w\s$\\{}.,;:!?'\"`]")


@dataclass(frozen=True)
class ContaminationMatch:
    """Question number `index` shares a run of tokens, or all of them, with a held-out question of a benchmark."""

    index: int
    benchmark: str
    held_out: str
    shared: str


def find_contamination(
    questions: Sequence[str], held_out: Mapping[str, Sequence[str]], *, ngram: int
) -> list[ContaminationMatch]:
    """Each question and held-out question, by benchmark, of which one holds the other or that share `ngram` tokens.

    Tokens are lower-cased words, numbers, LaTeX commands and operators. `ngram` is at least 4: with 13 copies with
    other numbers or names are found, with 8 mostly phrases ("how many hours a week does he spend").
    """
    assert ngram >= MIN_MATCH_TOKENS, f"ngram is {ngram}, expected at least {MIN_MATCH_TOKENS}"
    known = [(benchmark, text) for benchmark, texts in held_out.items() for text in texts]
    asked, kept = [_tokens(text) for text in questions], [_tokens(text) for _, text in known]
    shared = {(i, j): asked[i] for i, j in _contained(asked, kept)}
    shared |= {(i, j): kept[j] for j, i in _contained(kept, asked)}
    index: defaultdict[Tokens, set[int]] = defaultdict(set)
    for j, run in ((j, run) for j, tokens in enumerate(kept) for run in _runs(tokens, ngram)):
        index[run].add(j)
    for i, run in ((i, run) for i, tokens in enumerate(asked) for run in _runs(tokens, ngram)):
        for j in index.get(run, ()):
            shared.setdefault((i, j), run)
    return [
        ContaminationMatch(i, *known[j], "the whole question" if asked[i] == kept[j] else " ".join(run))
        for (i, j), run in sorted(shared.items())
    ]


def _tokens(text: str) -> Tokens:
    plain = unicodedata.normalize("NFKC", text).lower().replace("\\dfrac", "\\frac")
    return tuple(_TOKEN.findall(_UNSEEN.sub(" ", plain)))


def _runs(tokens: Tokens, size: int) -> list[Tokens]:
    return [tokens[i : i + size] for i in range(len(tokens) - size + 1)]


def _contained(parts: Sequence[Tokens], wholes: Sequence[Tokens]) -> Iterator[tuple[int, int]]:
    """(part, whole) where the part is a run of the whole; all of it where below `SHORTEST_RUN` tokens."""
    heads: defaultdict[Tokens, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        heads[part[:MIN_MATCH_TOKENS]] += [i] if part else []
    for j, whole in enumerate(wholes):
        for start in range(max(1, len(whole) - MIN_MATCH_TOKENS + 1)):
            head = whole[start : start + MIN_MATCH_TOKENS]
            yield from ((i, j) for i in heads.get(head, ()) if whole[start : start + len(parts[i])] == parts[i])
