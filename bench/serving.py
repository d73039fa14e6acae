"""`make bench-serving`: the policy service beside a bare engine and vLLM's own servers, on the default model.

    unary_vs_engine, stream_vs_engine   tokens a second ÷ those of `AsyncLLM.generate` in the server's own process, on
                                        the very same engine; the worst of 1, 4 and 16 at once
    stream_vs_vllm_http                 tokens a second ÷ those of vLLM's OpenAI server, 16 streams at once
    ttft_p99_vs_vllm_http               99th percentile of the time to the first token ÷ its
    unary_vs_vllm_grpc                  tokens a second ÷ those of vLLM's gRPC server (smg-grpc-servicer), 16 at once
    hardened_vs_plain                   TLS, keys, metrics and recording on ÷ all off, 16 streams at once
    overload_goodput                    tokens a second of calls that are answered, at four times the calls that can be
                                        ÷ the most there are of it without overload
    shed_p99_ms                         milliseconds until a call is turned away then, 99th percentile

Engines are set alike, and all servers are asked for the same: chats, each answered by a fixed number of tokens with the
log-probability of each. What is compared is measured one after the other within a round; ours and the engine alone
there and back, as they differ by less than two measurements of either do. `cpu_ms_per_token` and its like are
milliseconds of processor time of the server's front end for each token, all its threads together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import Ratio, Target
from bench.serving_clients import Ask, Http, Load, Ours, Smg, load
from bench.serving_processes import Policy, Server, broker_with_topics, grpc_server, http_server, policy_server
from thumbwheel.tls import ClientTls

CONCURRENCY = {1: 96, 4: 96, 16: 64}
"""How many at once, and the tokens of each."""
MOST, BURST_TOKENS, BURSTS = 16, 32, 4
PEAK, OVERLOAD, OVERLOAD_TOKENS = 64, 4.0, 32
_WORDS = ("river", "stone", "market", "winter", "engine", "garden", "letter", "music", "harbour", "paper", "window")


class Prompts:
    """Questions, no two alike, so that none is in a cache already."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def take(self, count: int) -> list[str]:
        """The next ones, of about forty tokens with the chat's frame."""
        return [f"Tell me about {' '.join(self._random.choices(_WORDS, k=12))}." for _ in range(count)]


@dataclass
class Overload:
    """What one round of overload came to."""

    peak: float = 0.0
    goodput: float = 0.0
    sheds: list[float] = field(default_factory=list)


@dataclass
class Bench:
    """Everything that is measured."""

    policy: Policy
    prompts: Prompts
    ours: Mapping[str, Ours]
    rates: dict[str, list[float]] = field(default_factory=dict)
    firsts: dict[str, list[list[float]]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    overloads: list[Overload] = field(default_factory=list)

    async def measure(self, name: str, server: Server, ask: Ask, count: int, tokens: int, at_once: int) -> Load:
        """Tokens a second of one load, kept under `name`."""
        before = server.front_end_seconds
        found = await load(ask, self.prompts.take(count), tokens, at_once=at_once)
        self._keep(name, found.rate, (server.front_end_seconds - before) / found.tokens)
        self.firsts.setdefault(name, []).append(found.firsts)
        return found

    async def bare(self, name: str, at_once: int, tokens: int, *, stream: bool) -> None:
        """The same of the engine alone."""
        before = self.policy.front_end_seconds
        command = {"do": "bare", "prompts": self.prompts.take(at_once), "tokens": tokens, "stream": stream}
        found = await self.policy.tell(command)
        taken = self.policy.front_end_seconds - before
        self._keep(name, found["tokens"] / found["seconds"], taken / found["tokens"])

    async def beside_engine(self, kind: str, ask: Ask, at_once: int, tokens: int) -> None:
        """Ours and the engine alone, there and back, so that what drifts falls on both alike."""
        name = f"{kind} {at_once}"
        bare = partial(self.bare, f"bare {name}", at_once, tokens, stream=kind == "stream")
        ours = partial(self.measure, name, self.policy, ask, at_once, tokens, at_once)
        for turn in (bare, ours, ours, bare):
            await turn()
        for each in (name, f"bare {name}"):  # both were of as many tokens
            self.rates[each][-2:] = [statistics.harmonic_mean(self.rates[each][-2:])]
            self.processor[each][-2:] = [statistics.fmean(self.processor[each][-2:])]

    def _keep(self, name: str, rate: float, processor: float) -> None:
        self.rates.setdefault(name, []).append(rate)
        self.processor.setdefault(name, []).append(1000 * processor)

    async def plain(self) -> None:
        """Streams with everything off, vLLM's metrics too."""
        await self.policy.tell({"do": "metrics", "on": False})
        await self.measure("plain", self.policy, self.ours["plain"].stream, MOST, CONCURRENCY[MOST], MOST)
        await self.policy.tell({"do": "metrics", "on": True})

    async def overload(self, seconds: float) -> None:
        """First the most that there is, with as many at once as run at once; then calls at random times, so many that a
        quarter can be answered.
        """
        found, ours = Overload(), self.ours["default"]
        ends: list[tuple[float, int]] = []

        def counted(tokens: int) -> None:
            ends.append((time.perf_counter(), tokens))

        async def user() -> None:
            while True:
                await ours.tokens_in_time(self.prompts.take(1)[0], OVERLOAD_TOKENS, counted)

        async with _running([user] * PEAK):
            found.peak = await _rate(ends, seconds)
        calls: set[asyncio.Task[None]] = set()
        dice = random.Random(len(self.overloads))

        async def call() -> None:
            taken = await ours.tokens_in_time(self.prompts.take(1)[0], OVERLOAD_TOKENS, counted)
            if taken is not None:
                found.sheds.append(taken)

        async def arrivals() -> None:
            at, loop = time.perf_counter(), asyncio.get_running_loop()
            while True:
                at += dice.expovariate(OVERLOAD * found.peak / OVERLOAD_TOKENS)
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                task = loop.create_task(call())
                calls.add(task)
                task.add_done_callback(calls.discard)

        async with _running([arrivals]):
            found.goodput = await _rate(ends, seconds)
        await asyncio.gather(*calls)  # what was let in is answered: none of it was counted in vain
        self.overloads.append(found)


@contextlib.asynccontextmanager
async def _running(what: Sequence[Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(one()) for one in what]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _rate(ends: Sequence[tuple[float, int]], seconds: float) -> float:
    """Tokens a second, once it has settled for a third of the time."""
    await asyncio.sleep(seconds / 3)
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    end = time.perf_counter()
    return sum(tokens for at, tokens in ends if start < at <= end) / (end - start)


def steps(bench: Bench, peers: Mapping[str, tuple[Server, Any]], seconds: float) -> dict[str, Callable[[], Any]]:
    """What is done in a round, in order; what is compared stands side by side."""
    ours, policy = bench.ours["default"], bench.policy
    found: dict[str, Callable[[], Any]] = {}
    for at_once, tokens in CONCURRENCY.items():
        for kind, ask in (("unary", ours.unary), ("stream", ours.stream)):
            found[f"{kind} {at_once}"] = partial(bench.beside_engine, kind, ask, at_once, tokens)
    hardened = bench.ours["hardened"].stream
    found["hardened"] = partial(bench.measure, "hardened", policy, hardened, MOST, CONCURRENCY[MOST], MOST)
    found["plain"] = bench.plain
    bursts: dict[str, tuple[Server, Any]] = {"bursts": (policy, ours.stream)}
    if "http" in peers:
        server, client = peers["http"]
        bursts["http"] = (server, client.stream)
    for name, (server, ask) in bursts.items():
        found[name] = partial(bench.measure, name, server, ask, BURSTS * MOST, BURST_TOKENS, MOST)
    if "grpc" in peers:
        server, client = peers["grpc"]
        found["grpc"] = partial(bench.measure, "grpc", server, client.unary, MOST, CONCURRENCY[MOST], MOST)
        found["unary"] = partial(bench.measure, "unary", policy, ours.unary, MOST, CONCURRENCY[MOST], MOST)
    found["overload"] = partial(bench.overload, seconds)
    return found


def ratios(bench: Bench) -> tuple[list[Ratio], dict[str, float]]:
    """The figures, and those that are no ratio of two rates."""

    def of(name: str, target: Target, ours: Sequence[float], peer: Sequence[float], unit: str = "tokens/s") -> Ratio:
        return Ratio(name, unit, target, list(ours), list(peer))

    found = []
    for kind, least in (("unary", 0.98), ("stream", 0.97)):
        each = [
            of(f"{kind}_vs_engine_{n}", Target(), bench.rates[f"{kind} {n}"], bench.rates[f"bare {kind} {n}"])
            for n in CONCURRENCY
        ]
        worst = min(each, key=lambda one: harness.interval(one.by_round)[0])
        found += [of(f"{kind}_vs_engine", Target(least=least), worst.ours, worst.peer), *each]
    found.append(of("hardened_vs_plain", Target(least=0.97), bench.rates["hardened"], bench.rates["plain"]))
    if "http" in bench.rates:
        found.append(of("stream_vs_vllm_http", Target(least=1.05), bench.rates["bursts"], bench.rates["http"]))
        firsts = {n: [1000 * harness.percentile(one, 0.99) for one in bench.firsts[n]] for n in ("bursts", "http")}
        found.append(of("ttft_p99_vs_vllm_http", Target(most=0.95), firsts["bursts"], firsts["http"], "ms"))
        found.append(of("cpu_vs_vllm_http", Target(), bench.processor["bursts"], bench.processor["http"], "ms/token"))
    if "grpc" in bench.rates:
        found.append(of("unary_vs_vllm_grpc", Target(least=1.0), bench.rates["unary"], bench.rates["grpc"]))
        found.append(of("cpu_vs_vllm_grpc", Target(), bench.processor["unary"], bench.processor["grpc"], "ms/token"))
    for kind in ("unary", "stream"):
        name = f"{kind} {MOST}"
        found.append(
            of(f"cpu_{kind}_vs_engine", Target(), bench.processor[name], bench.processor[f"bare {name}"], "ms/token")
        )
    peaks, goodputs = [o.peak for o in bench.overloads], [o.goodput for o in bench.overloads]
    found.append(of("overload_goodput", Target(least=0.95), goodputs, peaks))
    shed = [1000 * harness.percentile(o.sheds, 0.99) for o in bench.overloads]
    found.append(of("shed_p99_ms", Target(most=20), shed, [1.0] * len(shed), "ms"))
    return found, {}


async def run(model: Path, rounds: int, seconds: float, leave_out: Sequence[str]) -> None:
    """All of it."""
    from services.prompts import PromptEncoder

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(broker_with_topics(folder))
        policy = stack.enter_context(policy_server(model, folder / "home", broker.bootstrap_servers))
        said = await policy.tell()
        peers: dict[str, tuple[Server, Any]] = {}
        if "http" not in leave_out:
            server, port = stack.enter_context(http_server(model, folder / "http.log"))
            peers["http"] = (server, Http(port, "default"))
        if "grpc" not in leave_out:
            server, port = stack.enter_context(grpc_server(model, folder / "grpc.log"))
            peers["grpc"] = (server, Smg(port, partial(_encode, PromptEncoder(model))))
        ports, tls = said["ports"], ClientTls(Path(said["ca"]))
        ours = {name: Ours(f"127.0.0.1:{ports[name]}") for name in ("default", "plain")}
        ours["hardened"] = Ours(f"127.0.0.1:{ports['hardened']}", tls, said["key"])
        bench = Bench(policy, Prompts(), ours)
        todo = steps(bench, peers, seconds)
        for warm in ("unary 16", "hardened", "plain", "http", "grpc"):
            if warm in todo:
                await todo[warm]()
        for kept in (bench.rates, bench.firsts, bench.processor):
            kept.clear()
        total = rounds * len(todo)
        for number in range(rounds):
            # Every second round the other way about, so that nothing always comes first.
            for at, name in enumerate(list(todo)[:: -1 if number % 2 else 1]):
                harness.progress(f"round {number + 1} of {rounds}: {name}", (number * len(todo) + at) / total)
                await todo[name]()
            print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in bench.rates.items()), flush=True)
        harness.progress("", 1.0)
        for client in [*ours.values(), *(client for _, client in peers.values())]:
            await client.close()
    found, also = ratios(bench)
    harness.report("serving", found, rounds, also)


def _encode(encoder: Any, text: str) -> list[int]:
    from thumbwheel.client import to_prompt

    ids: list[int] = encoder.encode(to_prompt(text))
    return ids


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement of overload")
    parser.add_argument("--model", default=None, help="a folder or a Hugging Face id; the default model where left out")
    parser.add_argument("--without", choices=["http", "grpc"], action="append", default=[], help="a peer to leave out")
    given = parser.parse_args()
    from trainer import base, runtime

    leave_out = list(given.without)
    if find_spec("smg_grpc_servicer") is None and "grpc" not in leave_out:
        print("vLLM's gRPC server is left out: pip install smg-grpc-servicer", flush=True)
        leave_out.append("grpc")
    runtime.before_imports()
    runtime.quiet_transformers()
    asyncio.run(run(base.fetch(given.model), given.rounds, given.seconds, leave_out))


if __name__ == "__main__":
    main()
