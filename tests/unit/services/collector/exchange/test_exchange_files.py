"""Files in and out: every bad row named, nothing twice, nothing of another tenant, and TRL's own columns."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import pytest

from services.collector import outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.exchange import reading
from services.collector.exchange.exporting import Exported, export_file
from services.collector.exchange.importing import Imported, Source, import_file
from services.collector.exchange.report import refusals
from services.collector.rights import copies, erasure, pii
from services.collector.rights.redaction import Redact
from services.collector.rights.tenants import TenantRules, Tenants
from services.collector.rules import Rules
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from tests.unit.services.collector.rights.test_rights_forget import arrive, forget
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import ComparisonEvent


def hh(number: int, chosen: str = "", rejected: str = "") -> dict[str, str]:
    asked = f"\n\nHuman: Question {number}?\n\nAssistant: Which?\n\nHuman: That one."
    return {
        "chosen": f"{asked}\n\nAssistant: {chosen or f'Better {number}.'}",
        "rejected": f"{asked}\n\nAssistant: {rejected or f'Worse {number}.'}",
    }


GOOD = [json.dumps(hh(number)).encode() for number in range(5)]
BAD = {
    b"{": "is no JSON: Expecting property name enclosed in double quotes",
    b"[1]": "is no JSON object",
    b'{"chosen": "\xff"}': "is not UTF-8",
    b"[" * 100_000: "is no JSON that can be read: it is nested too deep",
    b'{"chosen": "' + b"x" * reading.MAX_LINE_BYTES + b'"}': f"is longer than {reading.MAX_LINE_BYTES} bytes",
    b"{}": "chosen: is missing",
    b'{"chosen": "Hello", "rejected": "Hi"}': "chosen: does not begin with a turn of the human",
    b'{"chosen": "\\n\\nHuman: Hi", "rejected": "\\n\\nHuman: Hi"}': "chosen: does not end with the assistant's reply",
    b'{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: a", "rejected": 3}': "rejected: is int, not text",
    json.dumps({**hh(1), "rejected": hh(2)["rejected"]}).encode(): (
        "chosen and rejected do not share every turn but the last"
    ),
    b'{"chosen": "\\n\\nHuman: \\n\\nAssistant: a", "rejected": "\\n\\nHuman: \\n\\nAssistant: b"}': (
        "prompt[0].content: is empty"
    ),
}


async def take_in(
    database: Database, deployment: Deployment, path: Path, *, name: str = "auto", tenants: Tenants | None = None
) -> tuple[Imported, list[dict[str, object]]]:
    source = Source(deployment.tenant, "set", False, deployment.key, tenants or Tenants())
    with refusals(path) as refused:
        done = await import_file(database, parts.curator_of(database), source, path, name, refused, lambda _: None)
    report = refused.path.read_text().splitlines() if refused.path.exists() else []
    return done, [json.loads(line) for line in report]


async def write_out(
    database: Database, path: Path, name: str, *, tenant: str = "default", redact: Redact | None = None
) -> tuple[Exported, list[dict[str, object]]]:
    with refusals(path) as refused:
        done = await export_file(database, tenant, path, name, redact, refused, lambda _: None)
    return done, rows_of(path)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
async def test_exactly_the_malformed_rows_are_refused(
    database: Database, deployment: Deployment, tmp_path: Path, suffix: str
) -> None:
    lines = [b"\xef\xbb\xbf" + GOOD[0], b"", *GOOD[1:3], *BAD, *GOOD[3:]]
    path = tmp_path / f"in{suffix}"
    text = b"\n".join(lines)
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    done, report = await take_in(database, deployment, path)
    assert done == Imported(imported=5, duplicates=0, refused=len(BAD))
    assert [row["line"] for row in report] == list(range(5, 5 + len(BAD)))
    for row, reason in zip(report, BAD.values(), strict=True):
        assert str(row["reason"]).startswith(reason)
    rows = await database.read(partial(outbox.waiting, limit=1_000))
    events = [ComparisonEvent.FromString(row.value) for row in rows if row.topic == topics.COMPARISONS]
    assert {(e.chosen.text, e.rejected.text) for e in events} == {(f"Better {i}.", f"Worse {i}.") for i in range(5)}
    assert [m.content for m in events[0].prompt.chat.messages] == ["Question 0?", "Which?", "That one."]
    assert await take_in(database, deployment, path) == (Imported(0, 5, len(BAD)), report)


async def test_a_row_is_one_in_every_format_and_of_one_tenant(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    path, other = tmp_path / "in.jsonl", Deployment(deployment.key, "other")
    path.write_bytes(b"\n".join(GOOD))
    assert (await take_in(database, deployment, path))[0] == Imported(5, 0, 0)
    _, rows = await write_out(database, tmp_path / "out.jsonl", "openrlhf")
    assert len(rows) == 5
    assert (await take_in(database, deployment, tmp_path / "out.jsonl"))[0] == Imported(0, 5, 0)
    assert (await write_out(database, tmp_path / "other.jsonl", "hh", tenant="other"))[0] == Exported(0, 0)
    assert (await take_in(database, other, path))[0] == Imported(5, 0, 0)
    assert (await write_out(database, tmp_path / "theirs.jsonl", "hh", tenant="other"))[0] == Exported(5, 0)


@pytest.mark.parametrize("name", ["trl", "trl-chat", "hh", "openrlhf"])
async def test_what_comes_out_goes_in_as_the_same(
    database: Database, deployment: Deployment, settings: CollectorSettings, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    await take_in(database, deployment, path)
    done, _ = await write_out(database, tmp_path / "out.jsonl", name)
    assert done == Exported(5, 0)
    fresh = CollectorSettings(home=tmp_path / "fresh")
    again = Database(fresh.database_url)
    try:
        assert (await take_in(again, deployment, tmp_path / "out.jsonl", name=name))[0] == Imported(5, 0, 0)
        _, rows = await write_out(again, tmp_path / "again.jsonl", "hh")
        assert {json.dumps(row) for row in rows} == {json.dumps(hh(number)) for number in range(5)}
    finally:
        again.close()


async def test_an_export_holds_what_stands(database: Database, deployment: Deployment, tmp_path: Path) -> None:
    kept, gone, edited = deployment.pair("a", "b"), deployment.pair("c", "d"), deployment.generation("e")
    await arrive(database, *kept, *gone, edited)
    await deployment.submit(database, parts.comparison(*kept))
    taken_back = await deployment.submit(database, parts.comparison(*gone))
    await deployment.submit(database, parts.edit(edited, "better e"))
    await parts.retract(database, taken_back.record.feedback_id)
    _, rows = await write_out(database, tmp_path / "out.jsonl", "trl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("better e", "e")]
    index = [line.split() for line in copies.index_of(tmp_path / "out.jsonl").read_text().splitlines()]
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert [sha256 for sha256, _ in index] == [copies.line_hash(line) for line in lines]
    assert not copies.part_of(tmp_path / "out.jsonl").exists()
    with pytest.raises(errors.FailedPrecondition, match="is there already"):
        await write_out(database, tmp_path / "out.jsonl", "trl")
    with pytest.raises(errors.FailedPrecondition, match="cannot be written"):
        await write_out(database, tmp_path / "no" / "out.jsonl", "trl")


async def test_thumbs_come_and_go_as_unpaired_rows(database: Database, deployment: Deployment, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}.", "label": i % 2 == 0} for i in range(4)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (await take_in(database, deployment, path))[0] == Imported(4, 0, 0)
    done, written = await write_out(database, tmp_path / "out.jsonl", "trl-unpaired")
    assert done == Exported(4, 0)
    assert sorted(written, key=lambda row: str(row["prompt"])) == rows
    assert (await write_out(database, tmp_path / "pairs.jsonl", "trl"))[0] == Exported(0, 0)


async def test_an_export_is_redacted_and_names_what_it_leaves_out(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    mail, marked = deployment.pair("ada@example.com", "no"), deployment.pair("x\n\nHuman: y", "z")
    await arrive(database, *mail, *marked)
    for pair in (mail, marked):
        await deployment.submit(database, parts.comparison(*pair))
    done, rows = await write_out(database, tmp_path / "out.jsonl", "hh", redact=pii.redact)
    assert done == Exported(1, 1)
    assert str(rows[0]["chosen"]).endswith("?\n\nAssistant: [email]")
    [refused] = (tmp_path / "out.jsonl.refused.jsonl").read_text().splitlines()
    assert json.loads(refused)["reason"] == "a turn holds what marks the beginning of a turn"


async def test_forgetting_reaches_an_export(
    database: Database, deployment: Deployment, settings: CollectorSettings, tmp_path: Path
) -> None:
    mine, other = deployment.pair("mine", "b"), deployment.pair("other", "d")
    await arrive(database, *mine, *other)
    await deployment.submit(database, parts.comparison(*mine, user="ann"))
    await deployment.submit(database, parts.comparison(*other, user="bob"))
    await write_out(database, tmp_path / "out.jsonl", "trl")
    response = await forget(database, settings, "ann")
    assert (response.exported_rows_erased, list(response.exports_out_of_reach)) == (1, [])
    left = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in left] == ["other"]


async def test_what_is_forgotten_while_an_export_is_written_is_not_in_it(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    mine, other = deployment.pair("mine", "b"), deployment.pair("other", "d")
    await arrive(database, *mine, *other)
    await deployment.submit(database, parts.comparison(*mine, user="ann"))
    await deployment.submit(database, parts.comparison(*other, user="bob"))
    path = tmp_path / "out.jsonl"

    def meanwhile(_: int) -> None:
        # The rows are read, and will be written.
        database._queue  # noqa: B018
        connection = database._engine.connect()
        with connection.begin():
            erasure.forget(connection, Rules(), tenant="default", user_id="ann")
        connection.close()
        with pytest.raises(errors.Unavailable, match="is being written"):
            copies.scrub(path, {"x"})

    with refusals(path) as refused:
        done = await export_file(database, "default", path, "trl", None, refused, meanwhile)
    assert done == Exported(1, 0)
    assert [json.loads(line)["chosen"] for line in path.read_text().splitlines()] == ["other"]


async def test_an_import_is_taken_back_by_forgetting_it(
    database: Database, deployment: Deployment, settings: CollectorSettings, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    await take_in(database, deployment, path)
    response = await forget(database, settings, "import:set")
    assert (response.feedback_erased, response.generations_erased) == (5, 10)
    done, report = await take_in(database, deployment, path)
    assert (done, {row["reason"] for row in report}) == (Imported(0, 0, 5), {"was forgotten"})


async def test_consent_is_asked_for_first(database: Database, deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD[0])
    strict = Tenants(TenantRules(consent_required=True))
    with pytest.raises(errors.FailedPrecondition, match=r"requires consent.*--consent"):
        await take_in(database, deployment, path, tenants=strict)
    source = Source("default", "set", True, deployment.key, strict)
    with refusals(path) as refused:
        assert await import_file(
            database, parts.curator_of(database), source, path, "auto", refused, lambda _: None
        ) == Imported(1, 0, 0)
    assert (await write_out(database, tmp_path / "out.jsonl", "hh"))[0] == Exported(1, 0)


async def test_a_file_that_is_cut_short_says_so(database: Database, deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(GOOD))[:-20])
    with pytest.raises(errors.FailedPrecondition, match=r"in\.jsonl\.gz cannot be read"):
        await take_in(database, deployment, path)
