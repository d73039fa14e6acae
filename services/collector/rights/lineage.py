"""Which versions learnt from what was erased: the store holds the ids of the samples of every version."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from thumbwheel import files
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import SAMPLES, LocalStore
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

logger = logging.getLogger(__name__)


class Learnt(NamedTuple):
    """Names of versions, oldest first within their role."""

    directly: list[str]
    """Their own round used a sample."""

    descended: list[str]
    """They were trained further from one of those."""


def versions_that_learnt(store: Path, keys: Path, samples: Set[str]) -> Learnt:
    """The versions in the folder `store` that any of the samples went into.

    A version whose list of samples is not what its manifest says counts as having learnt: nothing shows that it has
    not. Raises `errors.FailedPrecondition` where there are versions, but no key to verify them with.
    """
    if not samples or not store.is_dir():
        return Learnt([], [])
    manifests = LocalStore(store, ManifestVerifier.load(keys)).versions(ModelRole.MODEL_ROLE_UNSPECIFIED)
    directly: list[str] = []
    descended: list[str] = []
    for manifest in sorted(manifests, key=lambda m: (m.role, m.sequence)):
        if _learnt(store / manifest.version, manifest, samples):
            directly.append(manifest.version)
        elif manifest.parent in {*directly, *descended}:
            descended.append(manifest.version)
    return Learnt(directly, descended)


def _learnt(folder: Path, manifest: CheckpointManifest, samples: Set[str]) -> bool:
    if not manifest.lineage.sample_count:
        return False  # a base model
    try:
        text = (folder / SAMPLES).read_bytes()
    except OSError as error:
        logger.error("samples of a version not read", extra={"version": manifest.version, "error": str(error)})
        return True
    if files.sha256_bytes(text) != manifest.lineage.samples_sha256:
        logger.error("samples of a version altered", extra={"version": manifest.version})
        return True
    return not samples.isdisjoint(text.decode().split())
