"""The policy service for `bench.observability`, whose metrics and traces are switched on and off while it runs.

One process for all that is compared: two engines differ by more than what is measured. It reads a word a line from
standard input, `bare`, `metrics` or `traces` (which are metrics and traces), and answers each with a line.

`bare` is what the service would be without: no call of prometheus_client does anything, vLLM's neither, and no span is
made. Who scrapes and who takes the spans are in the benchmark's own process.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

from services.policy.config import PolicySettings
from thumbwheel import serving, telemetry, tracing

_METHODS = {"Counter": ("inc",), "Gauge": ("inc", "dec", "set"), "Histogram": ("observe",), "Summary": ("observe",)}


class Switch:
    """Puts methods that do nothing in the place of those that count, and back."""

    def __init__(self) -> None:
        import prometheus_client
        from opentelemetry import trace

        self._real = {
            (kind, name): getattr(getattr(prometheus_client, kind), name)
            for kind, names in _METHODS.items()
            for name in names
        }
        self._classes: dict[str, Any] = {kind: getattr(prometheus_client, kind) for kind in _METHODS}
        self._tracer, self._no_tracer = tracing._tracer, trace.NoOpTracer()

    def to(self, mode: str) -> None:
        """`bare`, `metrics` or `traces`."""
        for (kind, name), real in self._real.items():
            setattr(self._classes[kind], name, _nothing if mode == "bare" else real)
        tracing._tracer = self._tracer if mode == "traces" else self._no_tracer


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of counting."""


def _listen(loop: asyncio.AbstractEventLoop, switch: Callable[[str], None]) -> None:
    for line in sys.stdin:
        done = threading.Event()

        def change(mode: str = line.strip(), done: threading.Event = done) -> None:
            switch(mode)
            done.set()

        loop.call_soon_threadsafe(change)  # in the loop: not in the middle of a call
        done.wait()
        print("done", flush=True)


async def main(settings: PolicySettings) -> None:
    """Serves, and listens for what to be."""
    from services.policy.__main__ import main as serve

    switch = Switch()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_listen, args=(loop, switch.to), daemon=True).start()
    await serve(settings)


if __name__ == "__main__":
    parsed = PolicySettings.from_command_line(prog="python -m bench.observability_server")
    telemetry.start("policy", parsed)
    serving.run("policy", main(parsed))
