"""Everything at once, and again: the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from services.collector.curation import Choice, Decision, Reason, Vote, assess, curate, curate_all
from tests.unit.services.collector.curation.population import World, ranked
from tests.unit.services.collector.curation.voting import compare, thumb

ROOT = Path(__file__).resolve().parents[5]


def votes_of_all_kinds(seed: int = 11) -> list[Vote]:
    """A small population under attack, with thumbs, ties, edits and control questions among the comparisons."""
    world = World(seed, prompts=150)
    votes = world.honest(60) + world.colluders(5, 60) + world.flooder(1_200)
    chance = random.Random(seed)
    changed = []
    for vote in votes:
        match chance.randrange(12):
            case 0:
                vote = replace(vote, choice=Choice.TIE)
            case 1:
                vote = replace(vote, b=None, choice=chance.choice([Choice.UP, Choice.DOWN]))
            case 2:
                vote = replace(vote, gold=Choice.A)
            case 3:
                vote = replace(vote, edit=True, choice=Choice.A)
        changed.append(vote)
    return ranked(changed)


def serialised(decisions: list[Decision]) -> bytes:
    return "\n".join(json.dumps(asdict(one)) for one in decisions).encode()


def digest() -> str:
    """Of all decisions on the population, the votes in an order of this process's own."""
    votes = votes_of_all_kinds()
    random.shuffle(votes)
    return hashlib.sha256(serialised(curate_all(votes).decisions)).hexdigest()


def test_replay_gives_the_same_bytes_in_any_order_and_any_process() -> None:
    command = [sys.executable, "-c", f"from {__name__} import digest; print(digest())"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    digests = {digest()}
    for seed in ("1", "2"):
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_each_vote_is_decided_once_and_as_it_would_be_by_itself() -> None:
    votes = votes_of_all_kinds()
    result = curate_all(votes)
    assert [one.feedback_id for one in result.decisions] == sorted(vote.feedback_id for vote in votes)
    raters = assess((vote.prompt_id, vote) for vote in votes)
    assert repr(raters) == repr(result.raters)
    one_by_one = [
        decision
        for prompt in sorted({vote.prompt_id for vote in votes})
        for decision in curate([vote for vote in votes if vote.prompt_id == prompt], raters)
    ]
    assert sorted(one_by_one, key=lambda one: one.feedback_id) == result.decisions
    assert {one.reason for one in result.decisions} >= {
        Reason.PREFERRED,
        Reason.PAIRED_THUMBS,
        Reason.UNPAIRED_THUMB,
        Reason.GOLD,
        Reason.TIE,
        Reason.SUPERSEDED,
        Reason.QUARANTINED_COLLUSION,
    }


def test_prompts_of_a_group_are_curated_together() -> None:
    votes = [compare("ann", "x", "y", prompt_id="p1"), compare("bob", "y", "x", prompt_id="p2")]
    apart = curate_all(votes).decisions
    together = curate_all(votes, groups={"p2": "p1"}).decisions
    assert [one.reason for one in apart] == [Reason.PREFERRED] * 2
    assert [one.reason for one in together] == [Reason.CONTESTED] * 2


def test_nothing_in_nothing_out() -> None:
    assert curate_all([]).decisions == []
    assert [one.reason for one in curate_all([thumb("ann", "x", up=True)]).decisions] == [Reason.UNPAIRED_THUMB]
