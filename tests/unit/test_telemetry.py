"""What every process tells of its surroundings, and of its certificate."""

from __future__ import annotations

import shutil
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from tests.certificates import Authority
from thumbwheel import telemetry, tls


def _around(home: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(telemetry.SurroundingsCollector(home))
    return {sample.name: sample.value for family in registry.collect() for sample in family.samples}


def test_disk_memory_and_clock_are_told_also_before_the_home_is_there(tmp_path: Path) -> None:
    found = _around(tmp_path / "not" / "there" / "yet")
    usage, memory = shutil.disk_usage(tmp_path), psutil.virtual_memory()
    assert found["thumbwheel_disk_size_bytes"] == usage.total
    assert found["thumbwheel_disk_free_bytes"] == pytest.approx(usage.free, rel=0.2)
    assert 0 < found["thumbwheel_memory_available_bytes"] <= found["thumbwheel_memory_size_bytes"] <= memory.total
    assert found["thumbwheel_clock_timestamp_seconds"] == pytest.approx(time.time(), abs=5.0)


def test_a_disk_that_does_not_answer_hides_no_other_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", broken)
    assert _around(tmp_path).keys() == {
        "thumbwheel_memory_available_bytes",
        "thumbwheel_memory_size_bytes",
        "thumbwheel_clock_timestamp_seconds",
    }


def test_when_the_certificate_expires_is_a_metric(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "ca").issue("policy", days=30)
    tls.ServerTls(pair.certificate, pair.key).credentials()
    [metric] = tls.EXPIRES.collect()
    expected = (datetime.now(UTC) + timedelta(days=30)).timestamp()
    assert metric.samples[0].value == pytest.approx(expected, abs=120.0)


def test_exemplars_are_served_to_who_asks_for_openmetrics() -> None:
    with telemetry.metrics_server(0, process="test") as port:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert b'thumbwheel_build_info{process="test",version="' in answer.read()


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3",
        "text/plain;version=0.0.4",
    ],
    ids=["prometheus 2", "prometheus 3", "plain"],
)
def test_names_keep_their_colons(accept: str) -> None:
    gauge = Gauge("vllm:test_requests", "As vLLM names its own.")
    try:
        with telemetry.metrics_server(0, process="test") as port:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert b"\nvllm:test_requests 0.0\n" in answer.read()
    finally:
        REGISTRY.unregister(gauge)
