"""Rules, dashboards and runbooks belong together, and promtool is content with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from k8s.monitoring import dashboards
from tests.monitoring.prometheus import MONITORING, RULE_TESTS, RULES, alerts, promtool

ROOT = Path(__file__).parents[2]


def test_promtool_takes_the_rules_and_the_configuration() -> None:
    assert f"SUCCESS: {RULES.read_text().count('record: ') + len(alerts())} rules found" in promtool(
        "check", "rules", str(RULES)
    )
    assert "SUCCESS" in promtool("check", "config", str(MONITORING / "prometheus.yaml"))


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_each_alert_fires_when_it_should_and_not_when_it_should_not(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(path))


def test_each_alert_has_both_tests() -> None:
    names = [test["name"] for path in RULE_TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    assert sorted(names) == sorted(f"{name} {how}" for name in alerts() for how in ("fires", "does not fire"))


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    headings = re.findall(r"^### (Thumbwheel\w+)$", (ROOT / "docs/operations.md").read_text(), flags=re.MULTILINE)
    assert headings == list(alerts())
    for name, alert in alerts().items():
        assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["labels"]["severity"] in ("page", "ticket")


def test_links_within_the_runbooks_lead_somewhere() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) - anchors == set()


def test_dashboards_are_as_they_are_written() -> None:
    on_disk = {path.stem: path.read_text() for path in dashboards.FOLDER.glob("*.json")}
    assert on_disk == {name: dashboards.render(name) for name in dashboards.DASHBOARDS}, "type `make dashboards`"
