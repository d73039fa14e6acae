"""`thumbwheel keys`: API keys, made, listed and revoked. Running servers take changes up within a second."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from thumbwheel import apikeys, errors
from thumbwheel.calls import DEFAULT_TENANT
from thumbwheel.cli_shared import Home, Json, fail
from thumbwheel.config import Settings

app = typer.Typer(no_args_is_help=True, help="API keys.")


def _folder(home: Path | None) -> Path:
    return (Settings() if home is None else Settings(home=home)).keys_path


@app.command("create")
def create(
    scope: Annotated[list[str], typer.Option(help=f"What it may do: {', '.join(apikeys.SCOPES)}. May be repeated.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = DEFAULT_TENANT,
    days: Annotated[float | None, typer.Option(help="Days until it expires; left out: never.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    try:
        key, text = apikeys.create(_folder(home), scopes=scope, tenant=tenant, days=days)
    except errors.ThumbwheelError as error:
        fail(error)
    if as_json:
        print(json.dumps({"id": key.id, "key": text}))
    else:
        print(text)
        print(f"key {key.id} of tenant {key.tenant}: {', '.join(key.scopes)}; it is not shown again", file=sys.stderr)


@app.command("list")
def listed(home: Home = None, as_json: Json = False) -> None:
    """List the keys there are or were."""
    try:
        keys = apikeys.listed(_folder(home))
    except errors.ThumbwheelError as error:
        fail(error)
    now = datetime.now(UTC)
    if as_json:
        shown = [{**asdict(key), "state": key.state(now)} for key in keys]
        print(json.dumps([{name: value for name, value in key.items() if name != "sha256"} for key in shown]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "tenant", "scopes", "created", "expires", "state")
    for key in keys:
        table.add_row(
            key.id, key.tenant, " ".join(key.scopes), key.created_at, key.expires_at or "never", key.state(now)
        )
    Console().print(table)


@app.command("revoke")
def revoke(
    id: Annotated[str, typer.Argument(help="Id of the key, as `thumbwheel keys list` shows it.")], home: Home = None
) -> None:
    """End a key."""
    try:
        key = apikeys.revoke(_folder(home), id)
    except errors.ThumbwheelError as error:
        fail(error)
    print(f"key {key.id} of tenant {key.tenant} is revoked")
