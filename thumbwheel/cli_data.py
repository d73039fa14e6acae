"""The commands that move data and erase it: `thumbwheel export`, `import` and `forget`.

Export and import work on the collector's database, beside a collector that runs or without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thumbwheel.calls import DEFAULT_TENANT
from thumbwheel.cli_shared import Home, Json, run

if TYPE_CHECKING:
    from services.collector.config import CollectorSettings
    from services.collector.database import Database
    from services.collector.exchange.report import Refusals

Tenant = Annotated[str, typer.Option(help="Whose data it is.")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database", help="SQLAlchemy URL of the collector's database; left out: in the home.")
]
TenantsFile = Annotated[
    Path | None,
    typer.Option("--tenants", help="TOML file with the tenants' rules; left out: tenants.toml in the home."),
]

FORMATS = ("trl", "trl-unpaired", "trl-chat", "hh", "openrlhf")


def register(app: typer.Typer) -> None:
    """Adds the commands."""

    @app.command("export")
    def export(
        file: Annotated[Path, typer.Argument(help="The file to write.")],
        format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "trl-chat",
        tenant: Tenant = DEFAULT_TENANT,
        database: DatabaseUrl = None,
        tenants: TenantsFile = None,
        home: Home = None,
        as_json: Json = False,
    ) -> None:
        """Write what is learnt from to a file of JSON lines, in a format of the field."""
        if format not in FORMATS:
            raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}", param_hint="--format")
        run(_export(file.resolve(), format, tenant, _settings(home, database, tenants), as_json))

    @app.command("import")
    def import_(
        file: Annotated[Path, typer.Argument(help="The file to read; one that ends in .gz is decompressed.")],
        format: Annotated[str, typer.Option("--format", help=f"auto, or one of {', '.join(FORMATS)}.")] = "auto",
        name: Annotated[str, typer.Option(help="What to call it; left out: the file's name.")] = "",
        consent: Annotated[
            bool, typer.Option("--consent", help="Those whose data it is agree that it is learnt from.")
        ] = False,
        tenant: Tenant = DEFAULT_TENANT,
        database: DatabaseUrl = None,
        tenants: TenantsFile = None,
        home: Home = None,
        as_json: Json = False,
    ) -> None:
        """Take preferences in from a file of JSON lines: they are curated and learnt from like any other."""
        if format not in ("auto", *FORMATS):
            raise typer.BadParameter(f"must be auto or one of {', '.join(FORMATS)}", param_hint="--format")
        name = name or file.name.removesuffix(".gz").removesuffix(".jsonl")
        run(_import(file, format, name, consent, tenant, _settings(home, database, tenants), as_json))

    @app.command("forget")
    def forget(
        user: Annotated[str, typer.Argument(help="Pseudonym of the user.")],
        tenant: Tenant = DEFAULT_TENANT,
        home: Home = None,
        as_json: Json = False,
    ) -> None:
        """Erase all of a user's content, and say what remains elsewhere and until when."""
        run(_forget(user, tenant, home, as_json))


def _settings(home: Path | None, database: str | None, tenants: Path | None) -> CollectorSettings:
    from services.collector.config import CollectorSettings

    given = {"home": home, "database": database, "tenants": tenants}
    return CollectorSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # each has its own type


@contextlib.asynccontextmanager
async def _opened(settings: CollectorSettings) -> AsyncIterator[Database]:
    from services.collector.database import Database

    database = await asyncio.to_thread(Database, settings.database_url, timeout=DATABASE_SECONDS)
    try:
        yield database
    finally:
        await asyncio.to_thread(database.close)


@contextlib.contextmanager
def _bar(what: str, total: int | None, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where that is a terminal. Yields what sets how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = sys.stderr.isatty() and not as_json
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


async def _export(file: Path, format: str, tenant: str, settings: CollectorSettings, as_json: bool) -> None:
    from services.collector import operate
    from services.collector.exchange import exporting
    from services.collector.exchange.report import refusals
    from services.collector.rights.redaction import Redaction
    from services.collector.rights.tenants import Tenants

    redact = Redaction(Tenants.load(settings.tenants_path)).of(tenant)
    async with _opened(settings) as database:
        await operate.recorded(database, settings.rules)
        total = await database.read(partial(exporting.size, name=format))
        with refusals(file) as refused, _bar(f"exporting to {file.name}", total, as_json) as progress:
            done = await exporting.export_file(database, tenant, file, format, redact, refused, progress)
    _tell(done._asdict() | {"file": str(file), "format": format}, refused, as_json)


async def _import(
    file: Path, format: str, name: str, consent: bool, tenant: str, settings: CollectorSettings, as_json: bool
) -> None:
    from services.collector.exchange.importing import Source, import_file
    from services.collector.exchange.report import refusals
    from services.collector.intake import Curator
    from services.collector.rights.tenants import Tenants
    from thumbwheel.auth import ReceiptKey

    size = _size(file)
    key = ReceiptKey.load(settings.keys_path)
    source = Source(tenant, name, consent, key, Tenants.load(settings.tenants_path))
    async with _opened(settings) as database:
        with refusals(file) as refused, _bar(f"importing {file.name}", size, as_json) as progress:
            done = await import_file(database, Curator(settings.rules), source, file, format, refused, progress)
    _tell(done._asdict() | {"file": str(file), "user": source.user_id}, refused, as_json)
    if done.refused and not done.imported and not done.duplicates:
        raise typer.Exit(1)


def _size(file: Path) -> int:
    from thumbwheel import errors

    if not file.is_file():
        raise errors.NotFound(f"{file} is no file.", remedy="Give the path of a file of JSON lines.")
    return file.stat().st_size


async def _forget(user: str, tenant: str, home: Path | None, as_json: bool) -> None:
    from google.protobuf.json_format import MessageToDict

    from thumbwheel.channels import key_from_environment
    from thumbwheel.client import AsyncClient
    from thumbwheel.stack import StackSettings, read_addresses
    from thumbwheel.tls import ClientTls

    at = read_addresses(StackSettings(home=home).home if home is not None else StackSettings().home)
    key, tls = key_from_environment(), ClientTls.from_environment()
    async with AsyncClient(control=at.control, tenant=tenant, timeout=FORGET_SECONDS, api_key=key, tls=tls) as client:
        response = await client.forget(user)
    if as_json:
        print(json.dumps(MessageToDict(response, preserving_proto_field_name=True)))
        return
    print(f"erased: {response.feedback_erased} pieces of feedback, {response.generations_erased} generations")
    print(f"the stream is clean by {response.stream_clean_at.ToDatetime().isoformat(' ', 'minutes')} UTC")
    if response.exported_rows_erased:
        print(f"rows erased from exports: {response.exported_rows_erased}")
    for path in response.exports_out_of_reach:
        print(f"erase by hand: {path}")
    if response.versions:
        print(f"learnt from it: {', '.join(response.versions)}")
    if response.descended_versions:
        print(f"trained further from those: {', '.join(response.descended_versions)}")


FORGET_SECONDS = 660.0
DATABASE_SECONDS = 120.0
"""A collector that runs may have the database for a while: it goes first."""


def _tell(done: dict[str, Any], refused: Refusals, as_json: bool) -> None:
    """What came of it, as a line or as JSON."""
    report = str(refused.path) if refused.count else ""
    if as_json:
        print(json.dumps(done | {"report": report, "reasons": dict(refused.reasons)}))
        return
    said = ", ".join(f"{value} {name}" for name, value in done.items() if isinstance(value, int))
    print(f"{done['file']}: {said}")
    if report:
        most, count = refused.reasons.most_common(1)[0]
        print(f"what was refused, and why, is in {report}; most often ({count}): {most}", file=sys.stderr)
