"""What the commands share: options, and running to an end.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from thumbwheel.client import AsyncClient
    from thumbwheel.stack import Addresses, StackSettings

Home = Annotated[Path | None, typer.Option(envvar="THUMBWHEEL_HOME", help="Folder with the deployment's state.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
User = Annotated[str, typer.Option(help="Pseudonym of the user whose judgement it is.")]


def settings(home: Path | None, **given: Any) -> StackSettings:
    """A deployment's settings: those given, and else of the environment."""
    from thumbwheel.stack import StackSettings

    values = {name: value for name, value in {"home": home, **given}.items() if value is not None}
    return StackSettings(**values)


def fail(error: Exception) -> NoReturn:
    """Tells an error in a line, and ends the command with status 1."""
    print(f"thumbwheel: {error}", file=sys.stderr)
    raise typer.Exit(1) from error


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a command to its end; a known error is told in one line and ends it with status 1."""
    import signal

    from thumbwheel import errors

    async def until_stopped() -> None:
        task = asyncio.current_task()
        assert task is not None
        # As Ctrl-C does: what is inside is left in order, and every part is stopped.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main

    try:
        asyncio.run(until_stopped())
    except errors.ThumbwheelError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except asyncio.CancelledError:
        raise typer.Exit(143) from None


def client(home: Path | None) -> AsyncClient:
    """A client of the deployment in `home`."""
    from thumbwheel.stack import read_addresses

    return client_at(read_addresses(settings(home).home))


def client_at(at: Addresses, **options: Any) -> AsyncClient:
    """A client with the API key and certificates that the environment names."""
    from thumbwheel.channels import key_from_environment
    from thumbwheel.client import AsyncClient
    from thumbwheel.tls import ClientTls

    return AsyncClient(
        policy=at.policy,
        reward=at.reward,
        collector=at.collector,
        api_key=key_from_environment(),
        tls=ClientTls.from_environment(),
        **options,
    )
