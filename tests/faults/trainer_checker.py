"""The checker of the trainer: decides from the stream and from published manifests alone what was learnt.

It imports nothing of the code under test. What it holds:

    stream      what lay on the comparisons topic: ids accepted and retracted, with their offsets
    versions    of every version: its manifest, and the ids in its `samples.txt`, whose hash the manifest signs

Every id that was accepted and never retracted is learnt exactly once, along the chain of versions from the base model;
one that was retracted is not learnt, or listed as retracted by a later version; nothing else is learnt; the chain has
no gap and no branch; and the ranges of offsets of its versions follow each other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Event(NamedTuple):
    """A record of the stream that can be read. `state` is `accepted` or `retracted`."""

    offset: int
    id: str
    state: str


@dataclass(frozen=True, slots=True)
class Version:
    """What a manifest says, and the ids that go with it."""

    name: str
    parent: str
    samples: Sequence[str]
    sample_count: int
    samples_sha256: str
    retracted: Sequence[str]
    start: int
    end: int
    weights_sha256: str


def violations(stream: Sequence[Event], versions: Sequence[Version]) -> Iterator[str]:
    """What is wrong, in words. The stream is of one partition, and all of it is to have been learnt."""
    chain = list(_chain(versions))
    if len(chain) + 1 != len(versions):
        yield f"{len(versions) - len(chain) - 1} versions are not on the way from the base model to the newest"
    yield from _broken(chain)
    learnt = Counter(id for version in chain for id in version.samples)
    accepted = {event.id for event in stream if event.state == "accepted"}
    retracted = {event.id for event in stream if event.state == "retracted"}
    listed = {id: place for place, version in enumerate(chain) for id in version.retracted}
    places = {id: place for place, version in enumerate(chain) for id in version.samples}
    for id, count in learnt.items():
        if count > 1:
            yield f"{id} was learnt {count} times"
        if id not in accepted:
            yield f"{id} was learnt and is not on the stream"
        if id in retracted and listed.get(id, -1) <= places[id]:
            yield f"{id} was learnt and retracted, and no later version says so"
    for id in sorted(accepted - retracted - learnt.keys()):
        yield f"{id} was accepted and never learnt"
    for id in listed:
        if id not in retracted:
            yield f"{id} is listed as retracted, and the stream does not say so"
    last = max((event.offset for event in stream), default=-1)
    if chain and chain[-1].end < last + 1 - len(retracted):
        yield f"the newest version has read up to {chain[-1].end} of {last + 1}"


def _chain(versions: Sequence[Version]) -> Iterator[Version]:
    """From the first version after the base model to the newest."""
    by_parent: Mapping[str, Version] = {version.parent: version for version in versions}
    at = next((version for version in versions if not version.parent), None)
    while at is not None and (at := by_parent.get(at.name)) is not None:
        yield at


def _broken(chain: Sequence[Version]) -> Iterator[str]:
    end = 0
    for version in chain:
        text = "".join(f"{id}\n" for id in sorted(version.samples))
        if hashlib.sha256(text.encode()).hexdigest() != version.samples_sha256:
            yield f"{version.name}: its ids are not those that the manifest signs"
        if len(version.samples) != version.sample_count:
            yield f"{version.name}: {len(version.samples)} ids, and the manifest says {version.sample_count}"
        if version.start != end:
            yield f"{version.name} begins at offset {version.start}, and the one before ended at {end}"
        end = version.end
