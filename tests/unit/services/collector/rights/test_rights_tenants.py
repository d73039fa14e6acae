"""The tenants file, consent, and what is too old."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import pytest

from services.collector import ledger
from services.collector.database import Database
from services.collector.rights import admission
from services.collector.rights.tenants import TenantRules, Tenants
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel import errors
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import FeedbackState

FILE = """
[defaults]
retention_days = 365

[tenants.clinic]
consent_required = true
redact = "builtin"

[tenants.game]
retention_days = 0.5
"""


def test_a_tenant_has_its_rules_or_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "tenants.toml").write_text(FILE)
    tenants = Tenants.load(tmp_path / "tenants.toml")
    assert tenants["clinic"] == TenantRules(consent_required=True, redact="builtin", retention_days=365.0)
    assert tenants["game"] == TenantRules(retention_days=0.5)
    assert tenants["anyone"] == TenantRules(retention_days=365.0)
    assert Tenants.load(None)["anyone"] == TenantRules()
    assert tenants["game"].expired_before(10**12) == 10**12 - 43_200_000_000
    assert TenantRules().expired_before(10**12) == 0
    assert tenants.shortest_retention_seconds == 43_200.0  # half a day, of `game`
    assert Tenants.load(None).shortest_retention_seconds == math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants.a]\nretention_days = -1", r"tenants\.a\.retention_days"),
        ("[tenants.a]\nretention = 3", r"tenants\.a\.retention: .*There are consent_required"),
        ("[defaults]\nconsent_required = 1", r"defaults\.consent_required"),
        ("[tenant.a]\n", r"tenant: is no table"),
        ("tenants = 3", r"tenants: is not a table"),
        ("[defaults", r"cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_the_setting(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(errors.FailedPrecondition, match=rf"rules\.toml.*{message}"):
        Tenants.load(path)
    with pytest.raises(errors.FailedPrecondition, match=r"absent\.toml cannot be read"):
        Tenants.load(tmp_path / "absent.toml")


REQUIRED = Tenants(named={"clinic": TenantRules(consent_required=True)})


@pytest.mark.parametrize(
    ("tenant", "asker", "rater", "learnt"),
    [
        ("clinic", True, True, True),
        ("clinic", None, True, False),
        ("clinic", True, None, False),
        ("clinic", True, False, False),
        ("default", None, None, True),
        ("default", False, None, False),
        ("default", None, False, False),
    ],
)
@pytest.mark.parametrize("held", [False, True])
async def test_without_consent_nothing_is_learnt(
    database: Database,
    deployment: Deployment,
    tenant: str,
    asker: bool | None,
    rater: bool | None,
    learnt: bool,
    held: bool,
) -> None:
    mine = Deployment(deployment.key, tenant)
    pair = mine.pair()
    for one in pair:
        if asker is not None:
            one.consent = asker
    vote = parts.comparison(*pair)
    if rater is not None:
        vote.consent = rater

    curator = parts.curator_of(database)

    async def arrive() -> None:
        await database.write(lambda c: ledger.store(c, curator, admission.admitted(c, pair, REQUIRED)))

    if not held:
        await arrive()
    submission = Checker(mine.key, 1_000, REQUIRED).check(vote, tenant=tenant)
    recorded = await parts.record(database, submission, curator=curator)
    if held:
        await arrive()
    find = partial(ledger.find, feedback_ids=[recorded.record.feedback_id], tenant=tenant)
    [record] = await database.read(find)
    state = FeedbackState.FEEDBACK_STATE_ACCEPTED if learnt else FeedbackState.FEEDBACK_STATE_APART
    assert (record.state, record.reason) == (state, "preferred" if learnt else "no_consent")
    told = await database.read(lambda c: c.exec_driver_sql("select topic from outbox").scalars().all())
    assert ("thumbwheel.comparisons.v1" in told) is learnt


async def test_what_is_too_old_is_not_taken_in_again(database: Database, deployment: Deployment) -> None:
    tenants = Tenants(named={"default": TenantRules(retention_days=30)})
    events = [deployment.generation(str(days)) for days in (31, 29, 0)]
    for one, days in zip(events, (31, 29, 0), strict=True):
        one.finished_at.FromSeconds(int(time.time()) - days * 86_400)
    unknown = deployment.generation("when?")

    def kept(rules: Tenants) -> list[GenerationEvent]:
        return database.read_now(lambda c: admission.admitted(c, [*events, unknown], rules))

    assert kept(tenants) == [*events[1:], unknown]
    assert kept(Tenants()) == [*events, unknown]
