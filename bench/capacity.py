"""How much it takes for how many users: unit costs measured here, a check of them, a simulation, and a plan.

    make bench-capacity
    make bench-capacity ARGS="--users 1000000 --users 1000000000"     # and plans for so many a day

The collector is the real process on SQLite, with its broker. What a generation, a comparison and a thumb take of its
processor, and what they leave on disk and on the stream, is measured one kind at a time. From that follows what a run
takes in which all three come at once, in other proportions: `ratios` are predicted ÷ measured, and within 20 % the unit
costs may be added up. Processor seconds are counted, not time on the clock: other work on the machine matters less.

How many replicas serve so many requests is simulated (SimPy): requests at random times, as many at once as the engines
have slots, and nobody is to wait long. What a GPU does was not measured; what is assumed of it stands in `Assumed`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import simpy

from bench.collector import SUBMIT, Service, running, send
from bench.collector_clients import write_requests
from bench.harness import percentile
from tests.unit.services.collector import parts
from thumbwheel.stream import open_log, topics
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import Feedback, SubmitFeedbackRequest

KINDS = ("generation", "comparison", "thumb")
TOLERANCE = 0.2
CELL = 1_000_000
"""Users a day of one deployment; more of them are more deployments side by side, each with tenants of its own."""
_SECONDS = 300.0
_WORDS = "a plain answer of some length that says what there is to say and then stops for good "


@dataclass(frozen=True)
class Spent:
    """Processor seconds of the collector, bytes in its record, bytes on the stream."""

    cpu: float
    record: float
    stream: float

    def each(self, count: int) -> Spent:
        """Of one, where so many took this."""
        return Spent(self.cpu / count, self.record / count, self.stream / count)


class Run:
    """A collector, its broker, and work for it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        service.broker.start()
        self._process = psutil.Process(service.process.popen.pid)
        self._pairs = list(service.pool)
        self._known, self._key = 2 * len(self._pairs), 0
        self._idle = 0.0

    def idle(self, seconds: float) -> None:
        """How much of a processor it takes to do nothing."""
        began, cpu = time.monotonic(), self._cpu()
        time.sleep(seconds)
        self._idle = (self._cpu() - cpu) / (time.monotonic() - began)

    def spend(self, counts: Mapping[str, int]) -> Spent:
        """So many of each kind, all at once; returns when all is recorded and published."""
        began, cpu, record, stream = time.monotonic(), self._cpu(), self._record(), self._stream()
        sent = 0
        with ThreadPoolExecutor(2) as pool:
            published = pool.submit(self._generations, counts.get("generation", 0))
            feedback = self._feedback(counts.get("comparison", 0), counts.get("thumb", 0))
            if feedback:
                path = self._service.home / "requests"
                write_requests(path, [SubmitFeedbackRequest(feedback=one).SerializeToString() for one in feedback])
                send(self._service.process.address, SUBMIT, path)
            sent = published.result(_SECONDS)
        self._service.until("SELECT count(*) FROM generations", self._known)
        self._service.until("SELECT count(*) FROM feedback", self._key)
        self._service.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0)
        idle = self._idle * (time.monotonic() - began)
        return Spent(self._cpu() - cpu - idle, self._record() - record, self._stream() - stream + sent)

    def _generations(self, count: int) -> int:
        log = open_log(self._service.broker.bootstrap_servers)
        producer, size = log.producer(), 0
        for i in range(0, count, 2):
            pair: Sequence[GenerationEvent] = self._service.deployment.pair(f"{_WORDS * 2}{i}", f"{_WORDS * 3}{i}")
            for event in pair:
                data = event.SerializeToString()
                size += len(data)
                producer.send(topics.GENERATIONS, event.generation.prompt_id.encode(), data)
            if i % 100 == 0:
                producer.flush(_SECONDS)
        producer.close(_SECONDS)
        log.close()
        self._known += count
        return size

    def _feedback(self, comparisons: int, thumbs: int) -> list[Feedback]:
        made = []
        for i in range(comparisons + thumbs):
            self._key += 1
            a, b = self._pairs[self._key % len(self._pairs)]
            key, user = f"key-{self._key}", f"user-{self._key}"
            chosen = parts.comparison(a, b, key=key, user=user)
            made.append(chosen if i < comparisons else parts.thumb(a, key=key, user=user))
        random.Random(self._key).shuffle(made)
        return made

    def _cpu(self) -> float:
        used = [one.cpu_times() for one in (self._process, *self._process.children())]
        return float(sum(one.user + one.system for one in used))

    def _record(self) -> int:
        [(pages,)], [(each,)] = self._service.query("PRAGMA page_count"), self._service.query("PRAGMA page_size")
        return int(pages) * int(each)

    def _stream(self) -> int:
        [(size,)] = self._service.query("SELECT coalesce(sum(length(value) + length(key)), 0) FROM outbox")
        return int(size)


@dataclass(frozen=True)
class Measured:
    """Unit costs by kind, and predicted ÷ measured of the mixed runs, a value a round."""

    units: Mapping[str, Spent]
    ratios: Mapping[str, Sequence[float]]


def measure(count: int, rounds: int) -> Measured:
    """A kind at a time, then all at once; so many rounds of both."""
    single: dict[str, list[Spent]] = {kind: [] for kind in KINDS}
    ratios: dict[str, list[float]] = {"cpu": [], "record": [], "stream": []}
    mixed = {"generation": count, "comparison": count // 2, "thumb": count // 4}
    with running("sqlite", pairs=count) as service:
        run = Run(service)
        run.spend(dict.fromkeys(KINDS, count // 4))  # warms up
        run.idle(3.0)
        for number in range(rounds):
            for kind in KINDS:
                single[kind].append(run.spend({kind: count}).each(count))
            found = run.spend(mixed)
            for name in ratios:
                predicted = sum(getattr(single[kind][-1], name) * mixed[kind] for kind in KINDS)
                ratios[name].append(predicted / getattr(found, name))
            print(f"round {number + 1} of {rounds}: " + told(ratios), file=sys.stderr, flush=True)
    units = {
        kind: Spent(*(median(getattr(one, name) for one in some) for name in ("cpu", "record", "stream")))
        for kind, some in single.items()
    }
    return Measured(units, ratios)


def told(ratios: Mapping[str, Sequence[float]]) -> str:
    """Medians, with the least and the greatest."""
    return ", ".join(f"{k} {median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for k, v in ratios.items())


@dataclass(frozen=True)
class Assumed:
    """What was not measured here. Money is in dollars."""

    requests_a_user: float = 10.0
    """Responses that a user asks for in a day."""
    votes_a_request: float = 0.1
    """Share of responses that are voted on; half of the votes are comparisons."""
    peak: float = 3.0
    """The busiest hour over the average."""
    tokens: int = 250
    """Of a response."""
    gpu_tokens: float = 5_000.0
    """Tokens a second of one GPU with all its slots taken (a model of eight billion weights)."""
    gpu_slots: int = 64
    gpu_pairs: float = 20.0
    """Comparisons a second that one GPU learns from."""
    wait: float = 0.5
    """Seconds that 99 of 100 requests may wait at the most."""
    stream_days: float = 14.0
    gpu_hour: float = 2.5
    core_hour: float = 0.04
    gigabyte_month: float = 0.1


def waits(rate: float, slots: int, seconds: float, requests: int = 6_000) -> float:
    """Seconds that 99 of 100 requests wait at the most, at `rate` a second, each holding a slot for `seconds`."""
    env = simpy.Environment()
    engine, draw, waited = simpy.Resource(env, slots), random.Random(1), list[float]()

    def request() -> Generator[Any, Any, None]:
        came = env.now
        with engine.request() as turn:
            yield turn
            waited.append(env.now - came)
            yield env.timeout(draw.expovariate(1 / seconds))  # lengths of answers differ

    def arrivals() -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(draw.expovariate(rate))
            env.process(request())

    env.process(arrivals())
    while len(waited) < requests:
        env.step()
    return percentile(waited[requests // 3 :], 0.99)  # the first find it empty


def replicas(rate: float, assumed: Assumed) -> int:
    """Fewest GPUs with which nobody waits too long."""
    seconds = assumed.tokens / (assumed.gpu_tokens / assumed.gpu_slots)
    count = max(1, math.ceil(rate * seconds / assumed.gpu_slots))
    while waits(rate, count * assumed.gpu_slots, seconds) > assumed.wait:
        count += 1
    return count


def plan(users: float, units: Mapping[str, Spent], assumed: Assumed) -> dict[str, float]:
    """What so many users a day take."""
    cells = max(1.0, users / CELL)
    requests = users / cells * assumed.requests_a_user
    votes = requests * assumed.votes_a_request
    each = {"generation": requests, "comparison": votes / 2, "thumb": votes / 2}

    def total(of: Callable[[Spent], float]) -> float:
        return sum(of(units[kind]) * count for kind, count in each.items())

    cpu, record, stream = total(lambda u: u.cpu), total(lambda u: u.record), total(lambda u: u.stream)
    policy = replicas(requests / 86_400 * assumed.peak, assumed)
    trainers = max(1, math.ceil(votes / 2 / 86_400 / assumed.gpu_pairs))
    busy = cpu / 86_400 * assumed.peak
    stored = 3 * stream * assumed.stream_days
    daily = {
        "serving": policy / assumed.peak * 24 * assumed.gpu_hour,  # replicas follow the load
        "training": trainers * 24 * assumed.gpu_hour,
        "collecting": 2 * 24 * assumed.core_hour * max(1.0, busy),
        "storing": (stored + 2 * record * 365) / 1e9 * assumed.gigabyte_month / 30,
    }
    return {
        "deployments": cells,
        "requests_a_second_at_the_peak": cells * requests / 86_400 * assumed.peak,
        "policy_gpus": cells * policy,
        "trainer_gpus": cells * trainers,
        "collector_cores_at_the_peak": cells * busy,
        "busiest_collector": busy,
        "stream_megabytes_a_second": cells * stream / 86_400 * assumed.peak / 1e6,
        "stream_terabytes": cells * stored / 1e12,
        "record_terabytes_a_year": cells * record * 365 / 1e12,
        **{f"dollars_of_{name}_a_million_votes": value / votes * 1e6 for name, value in daily.items()},
    }


def main() -> int:
    """Measures and plans. Returns 1 where a prediction is off by more than 20 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="of each kind in a measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all measurements (default %(default)s)")
    parser.add_argument("--users", type=float, action="append", help="plan for so many a day; may be given again")
    given = parser.parse_args()
    found = measure(given.count, given.rounds)
    for kind, one in found.units.items():
        print(
            f"a {kind}: {1e3 * one.cpu:.2f} ms of a core, {one.record:.0f} bytes kept, {one.stream:.0f} on the stream"
        )
    plans = {f"{users:.0f}": plan(users, found.units, Assumed()) for users in given.users or ()}
    for users, planned in plans.items():
        print(f"{users} users a day: " + ", ".join(f"{name} {value:,.3g}" for name, value in planned.items()))
    print(told(found.ratios))
    ratios = {name: round(median(values), 3) for name, values in found.ratios.items()}
    print(json.dumps({"bench": "capacity", "ratios": ratios, "runs": given.rounds}))
    return 1 if any(abs(value - 1) > TOLERANCE for value in ratios.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
