"""What the service asks of its engine: each reference once a version."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.admission import Admission
from services.reward.reference import Baselines, References
from services.reward.service import RewardService
from services.turnstile import Turnstile
from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import Prompt
from thumbwheel.v1.reward_pb2 import ScoreItem, ScoreRequest, ScoreResponse

LIMIT = 8
NAMES = ["overall", "ensemble-0", "ensemble-1"]


class Engine:
    """What the service looks at of an engine."""

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(NAMES))}))
        self.version, self.turnstile = "reward-000001", Turnstile()
        self.live: Any = SimpleNamespace(path=folder, manifest=SimpleNamespace(metrics={}))


class Encoder:
    """Letters for tokens."""

    def encode_scored(self, prompt: Prompt, response: str, **_: object) -> list[int]:
        if len(response) > LIMIT:
            raise errors.InvalidArgument("is too long.", field="response")
        return [*prompt.text.encode(), *response.encode()]


class Scoring(RewardService):
    """With heads that count letters, and note what they read."""

    def __init__(self, folder: Path, references: References) -> None:
        self.engine, self.read = Engine(folder), list[str]()
        engine: Any = self.engine
        encoder: Any = Encoder()
        super().__init__(
            engine=engine,
            encoder=encoder,
            max_model_len=100,
            admission=Admission(slots=8, most=100, max_wait=1.0),
            references=references,
            baselines=Baselines(10),
        )

    async def _one(self, ids: list[int]) -> list[float]:
        self.read.append(bytes(ids).decode())
        return [float(len(ids)), 2.0 * len(ids), 1.0 * len(ids)]


@pytest.fixture
def scoring(tmp_path: Path) -> Iterator[Scoring]:
    """The service."""
    references = References(tmp_path / "r.sqlite", None, version="", capacity=1)
    yield Scoring(tmp_path, references)
    references.close()


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Scoring]:
    """The service, with a reference whose answers are long."""

    async def ask(prompt: Prompt) -> str:
        return "r" * (LIMIT + 1)

    references = References(tmp_path / "r.sqlite", ask, version="policy-000000", capacity=1)
    yield Scoring(tmp_path, references)
    references.close()


async def score(service: RewardService, *items: tuple[str, str]) -> ScoreResponse:
    asked: Sequence[ScoreItem] = [
        ScoreItem(prompt=Prompt(text="p"), response=response, reference_response=reference)
        for response, reference in items
    ]
    context: Any = None
    return await service.Score(ScoreRequest(items=asked), context)


async def test_a_reference_is_scored_once_a_version(scoring: Scoring) -> None:
    answer = await score(scoring, ("abc", "r"), ("ab", "r"), ("a", ""))
    assert sorted(scoring.read) == ["pa", "pab", "pabc", "pr"]
    assert [one.score_over_reference for one in answer.scores[:2]] == [2.0, 1.0]
    # The ensemble says 2 n and n of n letters: it is apart by as many as there are more than in the reference.
    assert [one.uncertainty for one in answer.scores[:2]] == pytest.approx([2**0.5, 0.5**0.5])
    assert not answer.scores[2].HasField("score_over_reference")
    scoring.read.clear()
    answer = await score(scoring, ("abcd", "r"))
    assert (scoring.read, answer.scores[0].score_over_reference) == (["pabcd"], 3.0)
    scoring.engine.version = "reward-000002"
    answer = await score(scoring, ("abcd", "r"))
    assert sorted(scoring.read) == ["pabcd", "pabcd", "pr"]
    assert (answer.version, answer.scores[0].score_over_reference) == ("reward-000002", 3.0)


async def test_a_reference_that_does_not_fit_is_done_without_unless_the_caller_brought_it(asking: Scoring) -> None:
    answer = await score(asking, ("abc", ""))
    assert answer.scores[0].score == 4.0
    assert not answer.scores[0].HasField("score_over_reference")
    with pytest.raises(errors.InvalidArgument, match="too long"):
        await score(asking, ("abc", "r" * (LIMIT + 1)))
