"""`thumbwheel collector`: what operators do with the record of feedback. Works on its database, running or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from thumbwheel.cli_shared import Home, fail

if TYPE_CHECKING:
    from services.collector.config import CollectorSettings
    from services.collector.database import Database

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="The record of feedback: replay, backup, guidelines, trust.")

Url = Annotated[str | None, typer.Option("--database", envvar="THUMBWHEEL_DATABASE", help="SQLAlchemy URL.")]
Tenant = Annotated[str, typer.Option(help="Whose it is.")]


def _run(home: Path | None, url: str | None, work: Callable[[Database, CollectorSettings], Awaitable[T]]) -> T:
    """Opens the database, works, and closes it. A known error is told in one line and ends it with status 1."""
    from services.collector.config import CollectorSettings
    from services.collector.operate import opened
    from thumbwheel import errors

    given = {name: value for name, value in (("home", home), ("database", url)) if value is not None}

    async def main() -> T:
        settings = CollectorSettings(**given)  # type: ignore[arg-type]  # two fields, each with its type
        async with opened(settings) as database:
            return await work(database, settings)

    try:
        return asyncio.run(main())
    except errors.ThumbwheelError as error:
        fail(error)


@app.command()
def replay(
    start: Annotated[str, typer.Option("--from", help="`beginning`, or a time such as 2026-01-31T12:00:00.")],
    home: Home = None,
    database: Url = None,
) -> None:
    """Publish again all that was committed from a time on; consumers drop what they have seen."""
    from services.collector import operate

    count = _run(home, database, lambda opened, _: operate.replay(opened, start))
    print(f"{count} events will be published again, as soon as the collector runs")


@app.command()
def backup(path: Path, home: Home = None, database: Url = None) -> None:
    """Write everything into one file, while the collector works."""
    from services.collector import dump

    rows = _run(home, database, lambda opened, _: asyncio.to_thread(dump.backup, opened, path))
    print(f"{rows} rows in {path}")


@app.command()
def restore(path: Path, home: Home = None, database: Url = None) -> None:
    """Put a backup into an empty database, SQLite or PostgreSQL, whichever it came from."""
    from services.collector import dump

    rows = _run(home, database, lambda opened, _: dump.restore(opened, path))
    print(f"{rows} rows restored")


@app.command()
def aspects(
    own: Annotated[list[str] | None, typer.Argument(help="NAME=FILE, a Markdown file that says how to judge.")] = None,
    tenant: Tenant = "default",
    home: Home = None,
    database: Url = None,
) -> None:
    """Make these a tenant's own aspects, beside the three of everybody; others are refused from then on."""
    from functools import partial

    from services.collector import guide

    texts = {}
    for item in own or []:
        name, _, file = item.partition("=")
        try:
            texts[name] = Path(file).read_text()
        except OSError as error:
            raise typer.BadParameter(f"{file}: {error.strerror}", param_hint=name) from error
    declare = partial(guide.declare, tenant=tenant, own=texts)
    made = _run(home, database, lambda opened, _: opened.write(declare))
    print(f"guidelines {made.version}: {', '.join(aspect.aspect for aspect in made.aspects)}")


@app.command()
def raters(tenant: Tenant = "default", home: Home = None, database: Url = None) -> None:
    """List how far each user is trusted, as JSON lines."""
    from services.collector import standing

    known, overrides = _run(home, database, lambda opened, _: opened.read(standing.all_raters))
    for who, rater in sorted(known.items()):
        if who.tenant != tenant:
            continue
        by_hand = "QUARANTINED" if who in overrides.quarantined else "RELEASED" if who in overrides.released else ""
        told = {
            "user": who.user_id,
            "reliability": rater.reliability,
            "weight": rater.weight,
            "votes": rater.votes,
            "quarantine": rater.quarantine.value if rater.quarantine else "",
            "bursts": len(rater.bursts),
            "by_hand": by_hand,
        }
        print(json.dumps(told))


@app.command()
def trust(
    user: str,
    state: Annotated[str, typer.Argument(help="quarantine, release, or assess: as the assessment has it.")],
    tenant: Tenant = "default",
    home: Home = None,
    database: Url = None,
) -> None:
    """Quarantine or release a user by hand; what the user judged is curated again."""
    from services.collector import raters, standing
    from services.collector.curation import RaterId

    states = {"quarantine": standing.QUARANTINED, "release": standing.RELEASED, "assess": ""}
    if state not in states:
        raise typer.BadParameter(f"must be one of {', '.join(states)}", param_hint="STATE")
    who = RaterId(tenant, user)
    _run(
        home,
        database,
        lambda opened, settings: raters.quarantine(opened, settings.rules, who, states[state], lambda: None),
    )


@app.command()
def release(feedback_id: str, home: Home = None, database: Url = None) -> None:
    """Lift every quarantine from one piece of feedback, whoever gave it."""
    from services.collector import operate

    _run(home, database, lambda opened, settings: operate.release(opened, settings.rules, feedback_id))


@app.command()
def gold(feedback_id: str, home: Home = None, database: Url = None) -> None:
    """Make the pair of this comparison a control question, with its verdict as the known answer."""
    from services.collector import operate

    _run(home, database, lambda opened, settings: operate.declare_gold(opened, settings.rules, feedback_id))
