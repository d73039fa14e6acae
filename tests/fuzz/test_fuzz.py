"""Decoders of bytes from outside return or raise our own errors: on seeds, old findings, and a few made up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.fuzz import run, targets
from tests.fuzz.targets import TARGETS, Decode
from thumbwheel import errors

EXECUTIONS = 2_000


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Decode]]:
    folder = targets.folder()
    yield request.param, TARGETS[request.param](folder)
    targets.discard(folder)


def test_seeds_and_old_findings(target: tuple[str, Decode]) -> None:
    name, decode = target
    seeds = sorted((run.SEEDS / name).iterdir())
    assert seeds
    for seed in seeds:
        targets.attempt(decode, seed.read_bytes())
    for nothing in (b"", b"\0", b"\xff" * 64, b"{" * 5_000, b"[" * 100_000):
        targets.attempt(decode, nothing)


def test_what_is_not_our_error_is_a_finding() -> None:
    def bug(data: bytes) -> None:
        raise ValueError("a bug")

    def refuse(data: bytes) -> None:
        raise errors.InvalidArgument("is wrong.", field="x")

    assert targets.attempt(refuse, b"") is False
    with pytest.raises(ValueError, match="a bug"):
        targets.attempt(bug, b"")


def test_every_target_has_seeds_and_no_seed_is_of_none() -> None:
    assert {path.name for path in run.SEEDS.iterdir()} == set(TARGETS)


@pytest.mark.timeout(300)
def test_the_short_form_finds_nothing(tmp_path: Path) -> None:
    fuzz = partial(run.run, executions=EXECUTIONS, seconds=0, seed=1, out=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        for name, result in zip(TARGETS, pool.map(fuzz, TARGETS), strict=True):
            assert not result["broken"], (tmp_path / name / "log").read_text()[-3_000:]
            assert result["executions"] == EXECUTIONS, name
            assert int(str(result["covered"])) > 0, name
