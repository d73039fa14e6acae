"""`thumbwheel reward`: the first reward model from a file, and a page on any."""

from __future__ import annotations

import subprocess
import sys

import typer

app = typer.Typer(no_args_is_help=True, help="Reward models: the first one from a file, and a page on any.")

_ALL = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _run(command: str, arguments: list[str]) -> None:
    # A process of its own: what torch is to do has to be said before it is loaded.
    done = subprocess.run([sys.executable, "-m", "trainer.reward", command, *arguments], check=False)
    raise typer.Exit(done.returncode)


@app.command("init", context_settings=_ALL)
def init(context: typer.Context) -> None:
    """Train the first reward model from a file of preferences. `--help` lists its options."""
    _run("init", context.args)


@app.command("report", context_settings=_ALL)
def report(context: typer.Context) -> None:
    """Write a page on a version: `thumbwheel reward report reward-000001`. `--help` lists its options."""
    _run("report", context.args)
