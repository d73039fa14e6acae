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


def test_what_is_written_is_as_it_would_be_written_now() -> None:
    paths = [*dashboards.FOLDER.glob("*.json"), MONITORING / "alerts.yaml"]
    assert {path: path.read_text() for path in paths} == dashboards.written(), "type `make dashboards`"
    assert yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"] == yaml.safe_load(RULES.read_text())


def test_containers_and_clusters_have_the_rules_and_the_dashboards() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["configs"]
    jobs = [one["job_name"] for one in yaml.safe_load(compose["prometheus"]["content"])["scrape_configs"]]
    assert jobs == ["policy", "reward", "collector", "trainer"]
    files = {Path(one["file"]) for one in compose.values() if "file" in one}
    assert {path.relative_to(ROOT) for path in (RULES, *dashboards.FOLDER.glob("*.json"))} <= {*files}
    kustomization = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())
    [generated] = kustomization["configMapGenerator"]
    assert sorted(generated["files"]) == sorted(f"dashboards/{name}.json" for name in dashboards.DASHBOARDS)
