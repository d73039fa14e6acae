"""Fixtures that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests import secrets
from tests.support import Process
from thumbwheel import tracing

# Tests have a time-out of their own. An example that takes long because the machine is busy is no failure.
settings.register_profile("thumbwheel", deadline=None)
settings.load_profile("thumbwheel")


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    """Processes put here are killed at the end of the module, whatever happened."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that this process has finished, in their order."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    return exporter


@pytest.fixture(scope="session", autouse=True)
def no_log_tells_a_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end of all, every log that a process of these tests wrote is searched for keys and passwords."""
    yield
    base = tmp_path_factory.getbasetemp()
    kept = [*secrets.kept(base)]
    told = {str(path): secrets.leaks(path.read_text(errors="replace"), kept) for path in base.rglob("*.log")}
    assert {path: what for path, what in told.items() if what} == {}, "a secret is in a log"
