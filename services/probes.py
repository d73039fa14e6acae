"""Canary probes: what a version computes on a fixed text, as the trainer says, and as the weights in the engine do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import Gauge

from services.config import SwapSettings
from thumbwheel import errors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.rollout_pb2 import Probe

DEVIATION = Gauge(
    "thumbwheel_swap_probe_deviation",
    "Largest difference between what the last probed version computed here and what its manifest says.",
)

_UNTOLD = Probe(prompt_token_ids=range(1, 9), token_ids=range(9, 17))
"""What is probed where a manifest tells of nothing: it still shows whether weights that were put back are the same."""

RESTORED_TOLERANCE = 1e-6
"""The same weights in the same engine compute the same: this is for the rounding of messages, not for the weights."""


class Probes:
    """Probes the weights in an engine, which is paused or has no requests. `scores` is for reward models."""

    def __init__(self, llm: Any, settings: SwapSettings, *, scores: bool) -> None:
        self._llm, self._scores = llm, scores
        self._tolerance = settings.probe_score_tolerance if scores else settings.probe_logprob_tolerance
        self._measured: dict[str, list[list[float]]] = {}

    async def check(self, version: VerifiedVersion) -> None:
        """Raises `errors.CorruptCheckpoint` where the weights now in the engine are not those that `version`'s manifest
        tells of. What they compute is remembered, for `check_restored`.
        """
        measured = await self._measure(version)
        for probe, found in zip(version.manifest.probes, measured, strict=False):
            expected = [probe.score] if self._scores else list(probe.logprobs)
            deviation = _deviation(found, expected)
            DEVIATION.set(deviation)
            if not deviation <= self._tolerance:  # so that what is no number is refused too
                raise errors.CorruptCheckpoint(
                    f"{version.manifest.version} does not compute what its manifest says: a probe is off by "
                    f"{deviation:.3f}, more than {self._tolerance:g}.",
                    remedy="Its weights are not those that the trainer had, or the trainer computes otherwise.",
                )
        self._measured = {version.manifest.version: measured} | dict(list(self._measured.items())[:1])

    async def check_restored(self, version: VerifiedVersion) -> None:
        """Raises `errors.Internal` where weights that were put back do not compute what they computed before."""
        before, now = self._measured.get(version.manifest.version), await self._measure(version)
        if before is None:
            return
        for expected, found in zip(before, now, strict=True):
            if not _deviation(found, expected) <= RESTORED_TOLERANCE:
                raise errors.Internal(f"{version.manifest.version} was put back, and computes something else now.")

    async def _measure(self, version: VerifiedVersion) -> list[list[float]]:
        return [await self._one(probe) for probe in version.manifest.probes or [_UNTOLD]]

    async def _one(self, probe: Probe) -> list[float]:
        prompt, continuation = list(probe.prompt_token_ids), list(probe.token_ids)
        if self._scores:
            answers = await self._llm.collective_rpc("probe_score", args=([*prompt, *continuation],))
        else:
            answers = await self._llm.collective_rpc("probe_logprobs", args=(prompt, continuation))
        # Of the workers that a model is spread over, only those with its last layers have an answer.
        return next((list(answer) for answer in answers if answer), [])


def _deviation(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference; infinite where the two are not of one length."""
    if len(found) != len(expected) or not found:
        return float("inf")
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    # `max` passes over what is no number; a sum does not.
    return max(differences) if sum(differences) == sum(differences) else float("nan")
