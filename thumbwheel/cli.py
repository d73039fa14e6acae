"""`thumbwheel`: start a deployment on this machine, and talk to one.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thumbwheel import cli_collector, cli_data, cli_feedback, cli_keys, cli_reward
from thumbwheel import cli_shared as shared
from thumbwheel.cli_shared import Home, Json, User

if TYPE_CHECKING:
    from thumbwheel.stack import StackSettings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
model_app = typer.Typer(no_args_is_help=True, help="Base models.")
app.add_typer(model_app, name="model")
app.add_typer(cli_feedback.app, name="feedback")
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_reward.app, name="reward")
app.add_typer(cli_collector.app, name="collector")


@app.command()
def up(
    home: Home = None,
    base_port: Annotated[int | None, typer.Option(help="The parts listen on ports above it.")] = None,
    kafka: Annotated[str | None, typer.Option(help="Kafka brokers, host:port; left out: the embedded broker.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a Hugging Face id or a local folder.")] = None,
    reference: Annotated[
        bool | None, typer.Option("--reference", help="Serve the reference policy too, and tell scores over it.")
    ] = None,
) -> None:
    """Start every part on this machine, and stop them all on Ctrl-C.

    Settings of single parts are taken from THUMBWHEEL_* variables; `python -m services.policy --help` lists a part's.
    """
    from thumbwheel.stack import Stack

    settings = shared.settings(home, base_port=base_port, kafka=kafka, model=model, serve_reference=reference)

    async def main(settings: StackSettings) -> None:
        from rich.console import Console

        from thumbwheel.status import read_status

        console = Console(stderr=True)
        with console.status("starting") as spinner:
            async with Stack.running(settings, progress=spinner.update) as stack:
                at = stack.addresses
                console.print(
                    f"[bold]Thumbwheel is up[/]: policy {at.policy}, reward {at.reward}, collector {at.collector}"
                )
                console.print(f"state in {settings.home}, logs in {settings.logs_path}; Ctrl-C stops it")
                async with shared.client_at(at, timeout=5.0) as client:
                    while True:
                        spinner.update((await read_status(client, at)).line())
                        await asyncio.sleep(1.0)

    shared.run(main(settings))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Watch simulated users change the model's behaviour. `thumbwheel demo --help` lists its options."""
    from thumbwheel.demo.config import DemoSettings

    settings = DemoSettings.from_command_line(context.args, prog="thumbwheel demo")

    async def main() -> None:
        from thumbwheel.demo.run import run

        await run(settings)

    shared.run(main())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context, home: Home = None) -> None:
    """Run the trainer; `--dry-run` says what it would train from what. `thumbwheel train --help` lists its options.

    With `--data FILE` it learns from a file and ends; otherwise from the deployment in `home`.
    """
    import subprocess

    from thumbwheel import errors
    from thumbwheel.stack import read_addresses

    arguments = list(context.args)
    if not any(argument.partition("=")[0] in ("--data", "--help") for argument in arguments):
        settings = shared.settings(home)
        try:
            at = read_addresses(settings.home)
        except errors.ThumbwheelError as error:
            shared.fail(error)
        given = {"--home": str(settings.home), "--bootstrap-servers": at.kafka}
        given |= {"--policy": at.policy, "--reward": at.reward}
        arguments = [part for pair in given.items() for part in pair] + arguments
    # A process of its own: it needs torch, which this command never loads.
    raise typer.Exit(subprocess.run([sys.executable, "-m", "trainer", *arguments], check=False).returncode)


@model_app.command("fetch")
def model_fetch(
    model: Annotated[str | None, typer.Argument(help="Hugging Face id or local folder; left out: the default.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where fetched models are kept.")] = None,
) -> None:
    """Fetch and check a base model, and print where it is."""
    from thumbwheel import errors
    from trainer.base import DEFAULT_CACHE, fetch

    try:
        print(fetch(model, cache or DEFAULT_CACHE, progress=sys.stderr.isatty()))
    except errors.ThumbwheelError as error:
        shared.fail(error)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    n: Annotated[int, typer.Option("-n", min=1, max=16, help="Candidates to compare; 1 streams one response.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes it reproducible.")] = None,
    user: User = "cli",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Ask the policy. The printed response can be judged with `thumbwheel feedback`."""
    from google.protobuf.json_format import MessageToDict

    from thumbwheel.v1.policy_pb2 import Generation, SamplingParams

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)

    async def main() -> None:
        async with shared.client(home) as client:
            if n > 1:
                shown = list((await client.candidates(prompt, n=n, sampling=sampling, user_id=user)).candidates)
            else:
                shown = []
                async for piece in client.stream(prompt, sampling=sampling, user_id=user):
                    if isinstance(piece, Generation):
                        shown.append(piece)
                    elif not as_json:
                        print(piece.text, end="", flush=True)
        cli_feedback.remember(shared.settings(home).home, shown)
        if as_json:
            fields = [MessageToDict(generation, preserving_proto_field_name=True) for generation in shown]
            print(json.dumps(fields, ensure_ascii=False))
            return
        if n == 1:
            print()
        for letter, generation in zip("abcdefghijklmnop", shown, strict=False):
            if n > 1:
                print(f"── {letter} ──\n{generation.text.strip()}\n")
        versions = sorted({span.version for generation in shown for span in generation.spans})
        ask = "thumbwheel feedback compare a" if n == 2 else "thumbwheel feedback thumb up"
        print(f"[{' '.join(versions)}] judge it: {ask}", file=sys.stderr)

    shared.run(main())


@app.command()
def versions(home: Home = None, as_json: Json = False) -> None:
    """List the published versions, newest first, and say what each was trained on."""
    from google.protobuf.json_format import MessageToDict
    from rich.console import Console
    from rich.table import Table

    from thumbwheel import errors
    from thumbwheel.auth import ManifestVerifier
    from thumbwheel.checkpoints.store import LocalStore
    from thumbwheel.v1.rollout_pb2 import ModelRole

    settings = shared.settings(home)
    try:
        store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
        roles = (ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD)
        manifests = [manifest for role in roles for manifest in store.versions(role)]
    except errors.ThumbwheelError as error:
        shared.fail(error)
    if as_json:
        print(json.dumps([MessageToDict(manifest, preserving_proto_field_name=True) for manifest in manifests]))
        return
    table = Table("version", "parent", "objective", "samples", "steps", "created", "weights")
    for manifest in manifests:
        lineage = manifest.lineage
        created = manifest.created_at.ToDatetime().isoformat(" ", "seconds")
        weights = "removed" if store.is_thin(manifest.version) else "there"
        counts = (str(lineage.sample_count), str(lineage.steps))
        table.add_row(manifest.version, manifest.parent, lineage.objective, *counts, created, weights)
    Console().print(table)


@app.command()
def status(home: Home = None, as_json: Json = False) -> None:
    """Say what the running deployment is doing. Ends with status 1 when a part is away."""

    async def main() -> None:
        from thumbwheel import errors
        from thumbwheel.stack import read_addresses
        from thumbwheel.status import read_status

        at = read_addresses(shared.settings(home).home)
        async with shared.client(home) as client:
            now = await read_status(client, at)
        print(json.dumps(now.to_json()) if as_json else now.line())
        if now.away:
            part, reason = sorted(now.away.items())[0]
            raise errors.Unavailable(f"{part} is away: {reason}", remedy="Type `thumbwheel up`.")

    shared.run(main())


cli_data.register(app)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
