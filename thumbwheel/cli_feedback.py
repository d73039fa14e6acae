"""`thumbwheel feedback`: say what you think of the responses that `thumbwheel generate` showed last."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thumbwheel import cli_shared as shared
from thumbwheel.cli_shared import Home, Json, User

if TYPE_CHECKING:
    from thumbwheel.client import AsyncClient, Choice

app = typer.Typer(no_args_is_help=True, help="Say what you think of responses.")

LAST_SHOWN = "last-shown.json"


def remember(home: Path, shown: list[Any]) -> None:
    """Keeps what was last shown, with its receipts, for `thumbwheel feedback`."""
    from google.protobuf.json_format import MessageToDict

    home.mkdir(parents=True, exist_ok=True)
    (home / LAST_SHOWN).write_text(json.dumps([MessageToDict(generation) for generation in shown]))


def _last_shown(home: Path | None, count: int) -> list[Any]:
    from google.protobuf.json_format import ParseDict

    from thumbwheel import errors
    from thumbwheel.v1.policy_pb2 import Generation

    path = shared.settings(home).home / LAST_SHOWN
    with contextlib.suppress(FileNotFoundError):
        shown = [ParseDict(fields, Generation()) for fields in json.loads(path.read_text())]
        if len(shown) >= count:
            return shown
    again = "thumbwheel generate -n 2 'your question'" if count == 2 else "thumbwheel generate 'your question'"
    return shared.fail(errors.FailedPrecondition("Nothing has been shown to judge.", remedy=f"Type `{again}` first."))


def _submit(home: Path | None, as_json: bool, say: Callable[[AsyncClient], Awaitable[Any]]) -> None:
    """Says it, and prints where it is recorded."""

    async def main() -> None:
        async with shared.client(home) as client:
            response = await say(client)
        if as_json:
            print(json.dumps({"feedback_id": response.feedback_id, "duplicate": response.duplicate}))
        else:
            print(f"recorded as {response.feedback_id}")

    shared.run(main())


@app.command("compare")
def compare(
    choice: Annotated[str, typer.Argument(help="a, b, tie or both_bad.")],
    user: User = "cli",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Say which of the two candidates shown last is better."""
    from typing import cast

    if choice not in ("a", "b", "tie", "both_bad"):
        raise typer.BadParameter("must be a, b, tie or both_bad", param_hint="CHOICE")
    a, b, *_ = _last_shown(home, 2)

    _submit(home, as_json, lambda client: client.compare(a, b, cast("Choice", choice), user_id=user))


@app.command("thumb")
def thumb(
    direction: Annotated[str, typer.Argument(help="up or down.")],
    user: User = "cli",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """A thumb for the response shown last."""
    if direction not in ("up", "down"):
        raise typer.BadParameter("must be up or down", param_hint="DIRECTION")
    shown = _last_shown(home, 1)[0]

    _submit(home, as_json, lambda client: client.thumb(shown, up=direction == "up", user_id=user))


@app.command("edit")
def edit(
    text: Annotated[str, typer.Argument(help="The better answer.")],
    user: User = "cli",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """A better answer than the response shown last."""
    shown = _last_shown(home, 1)[0]

    _submit(home, as_json, lambda client: client.edit(shown, text, user_id=user))


@app.command("comment")
def comment(
    text: Annotated[str, typer.Argument(help="What you want to say.")],
    user: User = "cli",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Words about the response shown last."""
    shown = _last_shown(home, 1)[0]

    _submit(home, as_json, lambda client: client.comment(shown, text, user_id=user))


@app.command("list")
def list_feedback(
    state: Annotated[str | None, typer.Option(help="Such as accepted, apart, quarantined.")] = None,
    reason: Annotated[str, typer.Option(help="Such as tie, cycle, over_user_cap.")] = "",
    user: Annotated[str, typer.Option(help="Of this user only.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, the newest.")] = 20,
    home: Home = None,
) -> None:
    """Say where feedback stands and why, newest first, as JSON lines."""
    from google.protobuf.json_format import MessageToDict

    from thumbwheel.v1.preference_pb2 import FeedbackState, ListFeedbackRequest

    names = {name.removeprefix("FEEDBACK_STATE_").lower(): value for name, value in FeedbackState.items() if value}
    if state is not None and state not in names:
        raise typer.BadParameter(f"must be one of {', '.join(names)}", param_hint="--state")
    states = [] if state is None else [names[state]]
    request = ListFeedbackRequest(states=states, reason=reason, user_id=user, page_size=limit)

    async def main() -> None:
        async with shared.client(home) as client:
            for record in (await client.list_feedback(request)).records:
                told = MessageToDict(record, preserving_proto_field_name=True)
                told["kind"] = record.feedback.WhichOneof("kind")
                told["user"] = told.pop("feedback")["user_id"]  # what was said is long, and holds receipts
                print(json.dumps(told, ensure_ascii=False))

    shared.run(main())
