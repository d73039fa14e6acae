"""`python -m bench.curation`: does curation stay as fast, and small, as there is more of it?

Curates 1,000,000 comparisons over 100,000 prompts, duplicates of prompts and reliability of all raters included, and a
tenth of it, each in a process of its own, in turn. The smaller one is the peer: `curate_growth` is the time of an event
at full size over that at a tenth, `curate_gib` the greatest resident memory of the process at full size, the votes
themselves included. What is timed is curation alone, not the making of the votes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from services.collector.curation import Choice, PromptGroups, RaterId, Response, State, Vote, curate_all

EVENTS = 1_000_000
EVENTS_A_PROMPT = 10
RESPONSES = 4
VERSIONS = 8
WORDS = 24
SECOND = 1_000_000


def texts(prompts: int, random: np.random.Generator) -> Iterator[str]:
    """Prompts of random words; one in twenty repeats an earlier one, one in twenty changes a word of it."""
    sentences: list[list[str]] = []
    for draw in random.random(prompts):
        if sentences and draw < 0.1:
            words = list(sentences[int(random.integers(len(sentences)))])
            if draw < 0.05:
                words[-1] = f"w{random.integers(20_000)}"
        else:
            words = [f"w{i}" for i in random.integers(20_000, size=WORDS)]
        sentences.append(words)
        yield " ".join(words)


def comparisons(events: int, random: np.random.Generator) -> Iterator[Vote]:
    """Votes of people who are right three times in four, fifty votes a person, over days at a person's pace."""
    prompts, users = events // EVENTS_A_PROMPT, max(1, events // 50)
    raters = [RaterId("acme", f"user{i:06}") for i in range(users)]
    given = np.zeros(users, np.int64)
    number = 0
    for prompt in range(prompts):
        prompt_id = f"prompt{prompt:08}"
        better_first = [
            Response(
                f"{prompt_id}-{i}-0123456789abcdef",
                hashlib.sha256(f"{prompt_id}-{i}".encode()).digest(),
                version=f"v{version}",
            )
            for i, version in enumerate(random.integers(VERSIONS, size=RESPONSES))
        ]
        for user, right, swap in zip(
            random.integers(users, size=EVENTS_A_PROMPT),
            random.random(EVENTS_A_PROMPT) < 0.75,
            random.random(EVENTS_A_PROMPT) < 0.5,
            strict=True,
        ):
            one, other = sorted(random.choice(RESPONSES, 2, replace=False))
            a, b = (better_first[other], better_first[one]) if swap else (better_first[one], better_first[other])
            at = int(given[user]) * 600 * SECOND + int(user) % 600 * SECOND
            yield Vote(
                f"feedback-0123456789abcdef-{number:08}",
                raters[user],
                prompt_id,
                Choice.A if right != swap else Choice.B,
                a,
                at,
                b,
                user_rank=int(given[user]) % 144,
            )
            given[user] += 1
            number += 1


def measure(events: int) -> dict[str, float]:
    """Curates so many events in this process: seconds, peak GiB, and what came of it."""
    random = np.random.default_rng(1)
    votes = list(comparisons(events, random))
    prompts = list(texts(events // EVENTS_A_PROMPT, random))
    start = time.process_time()
    index = PromptGroups()
    groups = {f"prompt{i:08}": index.add("acme", f"prompt{i:08}", text) for i, text in enumerate(prompts)}
    grouped = time.process_time()
    result = curate_all(votes, groups=groups)
    seconds = time.process_time() - start
    return {
        "events": events,
        "seconds": seconds,
        "seconds_grouping": grouped - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "accepted": sum(one.state is State.ACCEPTED for one in result.decisions) / events,
        "groups": len(set(groups.values())) / len(groups),
    }


def measured(events: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "bench.curation", "--one", str(events)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints what each run took, and the ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.curation", description=__doc__)
    parser.add_argument("--events", type=int, default=EVENTS, help="comparisons at full size")
    parser.add_argument("--runs", type=int, default=3, help="runs of each size")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    growth, gib = [], []
    for run in range(arguments.runs):
        small, full = measured(arguments.events // 10), measured(arguments.events)
        growth.append((full["seconds"] / full["events"]) / (small["seconds"] / small["events"]))
        gib.append(full["gib"])
        print(
            f"run {run + 1}: {1e6 * small['seconds'] / small['events']:.1f} µs an event at {small['events']:,}, "
            f"{1e6 * full['seconds'] / full['events']:.1f} µs at {full['events']:,} "
            f"({full['seconds_grouping']:.1f} of {full['seconds']:.1f} s for duplicates), {full['gib']:.2f} GiB; "
            f"{full['accepted']:.0%} accepted, {full['groups']:.0%} of the prompts are groups of their own"
        )
    print(
        f"growth {statistics.median(growth):.2f} ({min(growth):.2f} to {max(growth):.2f}), "
        f"{statistics.median(gib):.2f} GiB ({min(gib):.2f} to {max(gib):.2f})"
    )
    ratios = {"curate_growth": round(statistics.median(growth), 3), "curate_gib": round(max(gib), 3)}
    print(json.dumps({"bench": "curation", "ratios": ratios, "runs": arguments.runs}))


if __name__ == "__main__":
    main()
