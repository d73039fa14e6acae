"""Every prompt that is asked comes back once, whatever becomes of the services meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.unit.trainer.fleet import EOS, Fleet
from thumbwheel import errors
from thumbwheel.v1 import policy_pb2 as pb
from trainer import metrics, rollouts
from trainer.prompts import Prompt
from trainer.rollouts import Answer, Rollouts


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def asking(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rollouts]:
    monkeypatch.setattr(rollouts, "FIRST_PAUSE", 0.05)
    asking = Rollouts(fleet.connect, task="policy", responses=3, max_tokens=16)
    yield asking
    asking.close()


def prompts(count: int, reference: str = "") -> list[Prompt]:
    return [Prompt(f"{number}/1", (10 + number, 11), reference) for number in range(count)]


def back(asking: Rollouts, count: int, seconds: float = 60.0) -> list[Answer]:
    found: list[Answer] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} in {seconds} s"
        found += asking.answers(timeout=1.0)
    return found


def test_a_group_is_what_was_served_and_how_it_was_scored(asking: Rollouts) -> None:
    asking.ask(prompts(1, reference="one two"))
    ((prompt, group),) = back(asking, 1)
    assert group is not None
    assert (prompt.id, group.id, group.prompt) == ("0/1", "0/1", (10, 11))
    assert group.responses == tuple((11, *range(40, 43 + index), EOS) for index in range(3))
    assert [rollout.reward for rollout in group.rollouts] == [-5.0, -6.0, -7.0]
    assert group.rollouts[0].logprobs == pytest.approx([-1.0, -1.01, -1.02, -1.03, -1.04])
    assert all(rollout.finished for rollout in group.rollouts)
    assert (group.versions, group.reward_version) == (("policy-000000",), "reward-000001")
    assert group.reference_reward == -2.0
    assert asking.outstanding == 0


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_a_service_that_is_away_makes_rollouts_late_and_loses_none(name: str, fleet: Fleet, asking: Rollouts) -> None:
    fleet.stop(name)
    asking.ask(prompts(20))
    deadline = time.monotonic() + 60
    while not metrics.AWAY.labels("policy", name)._value.get():
        assert time.monotonic() < deadline
        assert asking.answers(timeout=0.1) == []
    retries = metrics.ROLLOUT_RETRIES.labels("policy", name)._value.get()
    while metrics.ROLLOUT_RETRIES.labels("policy", name)._value.get() < retries + 1:
        assert time.monotonic() < deadline
        assert asking.answers(timeout=0.1) == []
    fleet.start(name)
    found = back(asking, 20)
    assert sorted(prompt.id for prompt, _ in found) == sorted(prompt.id for prompt in prompts(20))
    assert all(group is not None and len(group.rollouts) == 3 for _, group in found)
    assert metrics.AWAY.labels("policy", name)._value.get() == 0


def test_services_that_go_while_they_work_lose_nothing(fleet: Fleet, asking: Rollouts) -> None:
    found: list[Answer] = []
    for number in range(4):
        name = ("policy", "reward")[number % 2]
        asking.ask([Prompt(f"{number}-{n}/1", (10 + n, 11 + number)) for n in range(15)])
        found += back(asking, 1)
        fleet.stop(name)
        fleet.start(name)
    found += back(asking, 60 - len(found))
    assert len({prompt.id for prompt, _ in found}) == len(found) == 60
    assert asking.outstanding == 0


def test_what_is_refused_comes_back_as_such_and_what_passes_is_asked_again(fleet: Fleet, asking: Rollouts) -> None:
    def refuse(request: pb.GenerateBulkRequest) -> pb.BulkError | None:
        if request.request_id == "1/1":
            return pb.BulkError(code="INVALID_ARGUMENT", field="prompt", message="prompt: is too long.")
        if request.request_id == "2/1" and fleet.asked.count("2/1") < 3:
            return pb.BulkError(code="RESOURCE_EXHAUSTED", message="Too much.")
        return None

    fleet.refuse = refuse
    asking.ask(prompts(4))
    found = {prompt.id: group for prompt, group in back(asking, 4)}
    assert found["1/1"] is None
    assert [found[key] is not None for key in ("0/1", "2/1", "3/1")] == [True, True, True]
    assert fleet.asked.count("2/1") == 3
    assert fleet.asked.count("0/1") == 1


def test_what_the_reward_model_is_unsure_of_is_taken_off(fleet: Fleet) -> None:
    fleet.doubt = lambda text: 0.5 * len(text.split())
    asking = Rollouts(fleet.connect, task="policy", responses=3, max_tokens=16, pessimism=2.0)
    asking.ask(prompts(1, reference="one two"))
    ((_, group),) = back(asking, 1)
    assert group is not None
    assert [rollout.reward for rollout in group.rollouts] == [-10.0, -12.0, -14.0]
    assert group.reference_reward == -2.0
    fleet.doubt = None
    asking.ask([Prompt("again", (10, 11))])
    with pytest.raises(errors.FailedPrecondition, match=r"reward-000001 has no ensemble.*--reward-pessimism 0"):
        back(asking, 1)
    asking.close()


def test_what_does_not_pass_ends_it_and_is_raised_where_answers_are_taken(fleet: Fleet, asking: Rollouts) -> None:
    fleet.denies = True
    asking.ask(prompts(1))
    with pytest.raises(errors.PermissionDenied, match="Not for you"):
        back(asking, 1)
