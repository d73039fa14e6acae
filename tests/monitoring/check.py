"""`make check-ops`: promtool on the rules, and every query of the dashboards on a running stack.

The last line is one JSON object; the status is 1 where something is not as it should be.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from k8s.monitoring import dashboards
from tests.monitoring.prometheus import MONITORING, RULE_TESTS, RULES, alerts, promtool
from tests.monitoring.watched import queries, watched, without_data


async def _unanswered() -> list[str]:
    with tempfile.TemporaryDirectory(prefix="thumbwheel-check-ops-") as folder:
        async with watched(Path(folder)) as running:
            return await without_data(running.prometheus)


def main() -> int:
    """Says what is wrong, and how much was looked at."""
    wrong = []
    commands = [["check", "rules", str(RULES)], ["check", "config", str(MONITORING / "prometheus.yaml")]]
    for arguments in [*commands, *(["test", "rules", str(path)] for path in RULE_TESTS)]:
        print(f"promtool {' '.join(arguments)}", file=sys.stderr)
        try:
            promtool(*arguments)
        except RuntimeError as error:
            wrong.append(str(error))
    for path, text in dashboards.written().items():
        if path.read_text() != text:
            wrong.append(f"{path} is not what dashboards.py writes: type `make dashboards`")
    print("starting a stack, and a Prometheus that scrapes it", file=sys.stderr)
    unanswered = asyncio.run(_unanswered())
    wrong += [f"no data: {one}" for one in unanswered]
    for one in wrong:
        print(one, file=sys.stderr)
    count = sum(map(len, queries().values()))
    print(
        json.dumps(
            {
                "check": "ops",
                "alerts": len(alerts()),
                "alert_tests": sum(path.read_text().count("- name:") for path in RULE_TESTS),
                "dashboards": len(dashboards.DASHBOARDS),
                "queries": count,
                "queries_with_data": count - len(unanswered),
                "wrong": len(wrong),
            }
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
