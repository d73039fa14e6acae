"""Clients of a gRPC server, in a process of their own: `python -m bench.collector_clients ADDRESS METHOD FILE ...`.

FILE holds serialised requests, each behind its length in four bytes. Without a rate, so many clients send one request
after the other; with one, requests are sent at random times (Poisson) whether or not earlier ones were answered, and a
request's time counts from when it was due. Prints one JSON object: requests, seconds, latencies in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

_WARM_UP = 0.1
_CALL_SECONDS = 60.0


def write_requests(path: Path, requests: list[bytes]) -> None:
    """Writes such a file."""
    path.write_bytes(b"".join(len(request).to_bytes(4, "little") + request for request in requests))


def read_requests(path: Path) -> list[bytes]:
    """Reads such a file."""
    data, at, requests = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        requests.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return requests


async def closed(call: Any, requests: Iterator[bytes], clients: int) -> list[float]:
    """Each client sends one after the other. Returns the latencies."""
    latencies: list[float] = []

    async def client() -> None:
        for request in requests:
            began = time.perf_counter()
            await call(request, timeout=_CALL_SECONDS)
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies


async def opened(call: Any, requests: Iterator[bytes], rate: float) -> list[float]:
    """Sends `rate` requests a second on average. Returns the latencies, from when each was due."""
    latencies: list[float] = []
    draw, due = random.Random(1), time.perf_counter()

    async def one(request: bytes, due: float) -> None:
        await call(request, timeout=_CALL_SECONDS)
        latencies.append(time.perf_counter() - due)

    async with asyncio.TaskGroup() as group:
        for request in requests:
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(request, due))
    return latencies


async def run(given: argparse.Namespace) -> dict[str, object]:
    """Connects, warms up with a tenth of the requests, then measures the rest."""
    requests = read_requests(given.file)
    warm = int(len(requests) * _WARM_UP)
    async with grpc.aio.insecure_channel(given.address) as channel:
        call: Any = channel.unary_unary(given.method)
        await closed(call, iter(requests[:warm]), given.clients)
        began, rest = time.perf_counter(), iter(requests[warm:])
        latencies = await (opened(call, rest, given.rate) if given.rate else closed(call, rest, given.clients))
        return {"requests": len(latencies), "seconds": time.perf_counter() - began, "latencies": latencies}


def main() -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.collector_clients", description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("method")
    parser.add_argument("file", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.0)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
