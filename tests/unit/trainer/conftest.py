"""Tiny models for the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import make_tiny_llama
from trainer import runtime

runtime.before_imports(beside_servers=True)


@pytest.fixture(scope="session")
def one_rank() -> None:
    """This process as a group of one rank, as the trainer's own."""
    runtime.prepare(threads=2)


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy."""
    return make_tiny_llama(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model."""
    return make_tiny_llama(tmp_path_factory.mktemp("reward"), seed=1, reward=True)
