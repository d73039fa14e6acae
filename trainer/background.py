"""Work that goes on beside learning: in order, one after another, and none of it fails unheard."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread of its own, by so much `nicer` than others: it gives way to those that compute."""

    def __init__(self, name: str, *, nicer: int = 10) -> None:
        self._executor = ThreadPoolExecutor(1, name, _give_way, (nicer,))
        self._futures: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Does `work` after all that was submitted before; not at all, where that failed. The future says when."""
        self.check()
        before, context = list(self._futures), contextvars.copy_context()  # traces go on in it

        def run() -> None:
            for future in before:
                future.result()
            context.run(work)

        future = self._executor.submit(run)
        self._futures.append(future)
        return future

    def check(self) -> None:
        """Raises what work failed with."""
        for future in [future for future in self._futures if future.done()]:
            future.result()
            self._futures.remove(future)

    @property
    def idle(self) -> bool:
        """Whether all of it is done."""
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Waits for all of it. Raises what it failed with. Every piece of work has deadlines of its own."""
        for future in list(self._futures):
            future.result()
        self.check()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()


def _give_way(nicer: int) -> None:
    # Linux has a niceness for each thread.
    with contextlib.suppress(OSError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nicer)
