"""What comes of versions: as they should be, or sabotaged in ways that a server must refuse, undo or wait out."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults.swapped import POLICY, World
from tests.support import until
from thumbwheel.v1.rollout_pb2 import CheckpointManifest

# A publisher that is killed while it writes: it says so, and then waits for its end.
_PUBLISHER = """
import sys, time
from pathlib import Path
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.v1.rollout_pb2 import CheckpointManifest
home, version, sequence = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def write(folder):
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    print("writing", flush=True)
    time.sleep(600)
store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))
store.publish(CheckpointManifest(version=version, role=1, sequence=sequence), write, ManifestSigner.load(home / "keys"))
"""


async def sound(world: World, chosen: int) -> None:
    """As it should be."""
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    world.announce(manifest)
    await world.is_live(manifest.version)
    world.live = chosen


async def by_delta(world: World, chosen: int) -> None:
    """With a delta against what is live, and without the full weights until it is: only the delta can be it."""
    parent = (await world.client.policy()).version
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe, parent=parent)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    whole, aside = (
        world.deployment.home / "store" / manifest.version / "model.safetensors",
        world.deployment.home / "aside",
    )
    whole.rename(aside)
    world.announce(manifest, digest)
    await world.is_live(manifest.version)
    aside.rename(whole)  # the next one may be a delta against it
    world.live = chosen


def refused(spoil: Callable[[World, int], tuple[CheckpointManifest, str]]) -> Callable[[World, int], object]:
    """A sabotage after which the version is refused or undone, and what was live stays live."""

    async def sabotage(world: World, chosen: int) -> None:
        before = await world.count("thumbwheel_versions_refused_total")
        world.announce(*spoil(world, chosen))

        async def said() -> bool:
            return await world.count("thumbwheel_versions_refused_total") > before

        await until(said, every=0.05)

    return sabotage


def _damaged(world: World, chosen: int, damage: Callable[[bytes], bytes]) -> tuple[CheckpointManifest, str]:
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    path = world.deployment.home / "store" / manifest.version / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    return manifest, digest


def torn(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """The weights end too early."""
    return _damaged(world, chosen, lambda whole: whole[:-1000])


def wrong_hash(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """One bit is another."""
    return _damaged(world, chosen, lambda whole: whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:])


def _changed(world: World, chosen: int, change: str) -> tuple[CheckpointManifest, str]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        for path in world.weights[chosen].folder.iterdir():
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        tensors = load_file(Path(folder) / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        if change == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        else:
            tensors[name][3, 5] = float("nan")
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return world.publish(Path(folder), world.weights[chosen].probe), ""


def wrong_shape(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but of another shape."""
    return _changed(world, chosen, "shape")


def not_a_number(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but a weight is no number."""
    return _changed(world, chosen, "nan")


def other_manifest(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Not the version that was announced."""
    return world.publish(world.weights[chosen].folder, world.weights[chosen].probe), "0" * 64


def wrong_probe(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but not what the trainer says it is: seen only once it is loaded."""
    other = world.weights[(chosen + 1) % len(world.weights)]
    return world.publish(world.weights[chosen].folder, other.probe), ""


async def store_away(world: World, chosen: int) -> None:
    """The store cannot be read when the version is announced; later it can."""
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    store, away = world.deployment.home / "store", world.deployment.home / "away"
    store.rename(away)
    before = await world.count("thumbwheel_versions_deferred_total")
    world.announce(manifest, digest)

    async def tried() -> bool:
        return await world.count("thumbwheel_versions_deferred_total") > before

    await until(tried)
    await world.check("while the store is away")
    away.rename(store)
    await world.is_live(manifest.version)
    world.live = chosen


async def publisher_killed(world: World, chosen: int) -> None:
    """Its version is announced nevertheless; it never comes, and the next one does."""
    world.sequence += 1
    command = [sys.executable, "-c", _PUBLISHER, str(world.deployment.home), world.version(), str(world.sequence)]
    publisher = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
    assert publisher.stdout is not None
    assert await asyncio.wait_for(asyncio.to_thread(publisher.stdout.readline), 60) == b"writing\n"
    publisher.send_signal(signal.SIGKILL)
    await asyncio.to_thread(publisher.wait, 30)
    publisher.stdout.close()
    before = await world.count("thumbwheel_versions_deferred_total")
    ghost = CheckpointManifest(version=world.version(), role=POLICY, sequence=world.sequence)
    world.announce(ghost, "0" * 64)

    async def tried() -> bool:
        return await world.count("thumbwheel_versions_deferred_total") > before

    await until(tried)


SABOTAGES: dict[str, Callable[[World, int], object]] = {
    "torn": refused(torn),
    "wrong hash": refused(wrong_hash),
    "wrong shape": refused(wrong_shape),
    "not a number": refused(not_a_number),
    "other manifest": refused(other_manifest),
    "wrong probe": refused(wrong_probe),
    "store away": store_away,
    "publisher killed": publisher_killed,
}


async def server_killed(world: World, chosen: int) -> None:
    """kill -9 while a swap is under way: what is started next serves either version, whole."""
    async with world.quiet():
        manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
        world.announce(manifest)
        world.process.kill()
        await asyncio.to_thread(world.process.start().wait_serving)
        await world.is_live(manifest.version)
    world.live = chosen
    world.report.kills += 1
