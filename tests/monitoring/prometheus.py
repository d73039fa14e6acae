"""A real Prometheus, with the rules as they are deployed, scraping whatever it is told to."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tests.support import free_port

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
RULES = MONITORING / "rules.yaml"
RULE_TESTS = sorted(Path(__file__).parent.glob("*rules.test.yaml"))
EVALUATION_SECONDS = 15.0
"""The interval that the rules are written for."""

_START_SECONDS = 60.0
_MISSING = "{name} is not there. On Debian type: sudo apt-get install prometheus; elsewhere take it from prometheus.io."


def program(name: str) -> str:
    """The path of "prometheus" or "promtool"."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(_MISSING.format(name=name))
    return found


def promtool(*arguments: str) -> str:
    """What promtool says. Raises RuntimeError with it where it is not content."""
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    """All recording rules and alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@dataclass(frozen=True)
class Alert:
    """An alert at a moment; its state is "pending" or "firing"; `since` is when an evaluation first found it so, in
    seconds since the epoch.
    """

    name: str
    labels: Mapping[str, str]
    state: str
    since: float


class Prometheus:
    """A running server. `evaluation_seconds` is its interval."""

    def __init__(self, address: str, evaluation_seconds: float) -> None:
        self.address, self.evaluation_seconds = address, evaluation_seconds

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query. Raises RuntimeError where Prometheus refuses it."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float | None:
        """The value of a query of one series at the most; None where there is none."""
        series = self.query(expression)
        assert len(series) < 2, series
        return float(series[0]["value"][1]) if series else None

    def exemplars(self, expression: str) -> list[dict[str, str]]:
        """The labels of the exemplars of a metric."""
        now = time.time()
        found = self._get("query_exemplars", query=expression, start=str(now - 3600), end=str(now + 60))
        return [one["labels"] for series in found for one in series["exemplars"]]

    def targets(self) -> dict[str, str]:
        """The health of each job: "up", "down" or "unknown"."""
        return {one["labels"]["job"]: one["health"] for one in self._get("targets", state="active")["activeTargets"]}

    def alerts(self) -> list[Alert]:
        """All alerts that are pending or firing."""
        found = self._get("alerts")["alerts"]
        return [
            Alert(one["labels"]["alertname"], one["labels"], one["state"], _seconds(one["activeAt"])) for one in found
        ]

    def firing(self) -> set[str]:
        """The names of alerts that fire."""
        return {alert.name for alert in self.alerts() if alert.state == "firing"}

    def evaluations(self, alert: Alert, now: float) -> int:
        """How many evaluations have found it so by `now`, in seconds since the epoch."""
        return 1 + int((now - alert.since) / self.evaluation_seconds)

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {error.read().decode()}") from error


@contextlib.contextmanager
def prometheus(
    folder: Path, targets: Mapping[str, str], *, scrape_seconds: float = 1.0, evaluation_seconds: float = 1.0
) -> Iterator[Prometheus]:
    """A server that scrapes `targets`, "host:port" by job, until the end of the body. Its data lie in `folder`.

    What the rules call one evaluation is one here too: their `for: 15s` becomes `evaluation_seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sooner = re.sub(r"for: 15s$", f"for: {1000 * evaluation_seconds:.0f}ms", RULES.read_text(), flags=re.MULTILINE)
    (folder / "rules.yaml").write_text(sooner)
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {
        "scrape_interval": f"{1000 * scrape_seconds:.0f}ms",
        "evaluation_interval": f"{1000 * evaluation_seconds:.0f}ms",
        "scrape_timeout": f"{1000 * scrape_seconds:.0f}ms",
    }
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
    ]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        _await_ready(address, process, log)
        yield Prometheus(address, evaluation_seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _seconds(text: str) -> float:
    """Of a time as Prometheus writes it, with nanoseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", text).replace("Z", "+00:00")).timestamp()


def _await_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"prometheus ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise TimeoutError(f"prometheus was not ready within {_START_SECONDS:g} s:\n{log.read_text()[-2000:]}")
