"""The short form of `make faults-swap`: each sabotage once, under load, and the server killed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import swaps
from tests.faults.sabotage import SABOTAGES

pytestmark = pytest.mark.timeout(300)


async def test_no_sabotage_costs_a_call_or_changes_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "KILL_EVERY", 16)
    report = await swaps.run(tmp_path, swaps=16, share=0.5, weights=2, users=4, seed=4)
    assert (report.failed, report.wrong) == ([], [])
    assert (report.swaps, report.kills) == (16, 1)
    assert len(report.pauses) > 4
    assert set(SABOTAGES) <= set(report.outcomes)
    assert report.outcomes["sound"] + report.outcomes["by delta"] >= 4
    assert report.calls > 16
