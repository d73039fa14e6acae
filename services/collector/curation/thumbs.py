"""Thumbs of opposite sign on one prompt, paired into comparisons; each thumb at most once."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container, Iterable

from services.collector.curation.votes import Choice, RaterId, Vote

Pair = tuple[Vote, Vote]
"""The thumb up, and the thumb down."""


def pair_thumbs(
    thumbs: Iterable[Vote], compared: Container[tuple[RaterId, frozenset[bytes]]]
) -> tuple[list[Pair], list[Vote]]:
    """Pairs, and the thumbs that stay alone.

    First each rater's own thumbs are paired, then those of different raters: one person's two thumbs say more of two
    responses than two persons' thumbs do. Nothing is paired on different prompts, on one text, or where the rater has
    compared the two already, which is in `compared` as the rater and the hashes of both texts. When a thumb came plays
    no part.
    """
    pairs: list[Pair] = []
    left: dict[bytes, list[Vote]] = defaultdict(list)
    own: dict[tuple[RaterId, bytes], list[Vote]] = defaultdict(list)
    for vote in thumbs:
        own[vote.rater, vote.prompt_sha256].append(vote)
    for (_, prompt), votes in own.items():
        matched, alone = _match(votes, compared)
        pairs += matched
        left[prompt] += alone
    single: list[Vote] = []
    for votes in left.values():
        matched, alone = _match(votes, compared)
        pairs += matched
        single += alone
    return pairs, single


def _match(
    votes: Iterable[Vote], compared: Container[tuple[RaterId, frozenset[bytes]]]
) -> tuple[list[Pair], list[Vote]]:
    """Pairs each thumb up, in the order of text and rater, with the first thumb down on another text."""
    ordered = sorted(votes, key=lambda vote: (vote.a.sha256, vote.rater))
    downs: dict[bytes, deque[Vote]] = defaultdict(deque)
    for vote in ordered:
        if vote.choice is Choice.DOWN:
            downs[vote.a.sha256].append(vote)
    pairs: list[Pair] = []
    alone: list[Vote] = []
    for up in ordered:
        if up.choice is not Choice.UP:
            continue
        for text, waiting in downs.items():
            if text == up.a.sha256 or _compared(up, waiting[0], compared):
                continue
            pairs.append((up, waiting.popleft()))
            if not waiting:
                del downs[text]
            break
        else:
            alone.append(up)
    alone += [vote for waiting in downs.values() for vote in waiting]
    return pairs, alone


def _compared(up: Vote, down: Vote, compared: Container[tuple[RaterId, frozenset[bytes]]]) -> bool:
    return up.rater == down.rater and (up.rater, frozenset((up.a.sha256, down.a.sha256))) in compared
