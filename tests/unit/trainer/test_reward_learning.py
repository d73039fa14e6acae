"""What people prefer is learnt, by three planted rules; and that they prefer long replies is not, unless it is let."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.trainer.samples import tokens
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import calibration, losses, publish
from trainer.config import TrainerSettings
from trainer.judge import Judged
from trainer.learner import Learner
from trainer.samples import Pair, Tokens

pytestmark = pytest.mark.usefixtures("one_rank")

GOOD, BAD, END = 251, 252, 2
RATE = 1e-3


@pytest.fixture(scope="module")
def scorer_path(policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model without an opinion, as training begins with."""
    folder = tmp_path_factory.mktemp("scorer")
    publish.write_scorer(policy_path, folder)
    return folder


def planted(
    count: int,
    seed: int,
    better: Callable[[Tokens], float],
    words: Callable[[random.Random, int], Tokens],
    *,
    longer_wins: float | None = None,
    wrong: float = 0.0,
) -> list[Pair]:
    """Pairs judged by a rule, but for a share of wrong judgements, in which the better reply is the longer one as often
    as it says.
    """
    rng, pairs = random.Random(seed), list[Pair]()
    while len(pairs) < count:
        prompt = tokens(rng, rng.randint(2, 8))
        first, second = ((*words(rng, rng.randint(3, 16)), END) for _ in range(2))
        if better(first) == better(second):
            continue
        chosen, rejected = (first, second) if better(first) > better(second) else (second, first)
        if rng.random() < wrong:
            chosen, rejected = rejected, chosen
        if longer_wins is not None and (len(chosen) > len(rejected)) != (rng.random() < longer_wins):
            continue
        pairs.append(Pair(id=f"{seed}/{len(pairs)}", prompt=prompt, chosen=chosen, rejected=rejected))
    return pairs


def learnt(path: Path, train: list[Pair], heldout: list[Pair], **changes: object) -> Judged:
    fields = {"batch_size": 32, "micro_batch_tokens": 4000, "epochs": 5, **changes}
    settings = TrainerSettings.model_validate(fields)
    objective = losses.objective("reward", ModelRole.MODEL_ROLE_REWARD, settings)
    learner = Learner(objective, path, settings, learning_rate=RATE)
    learner.learn(train, {}, round_number=1)
    judged = learner.judge(heldout)
    learner.close()
    return judged


def _marked(rng: random.Random, count: int) -> Tokens:
    """Random words, with a good or a bad one among them."""
    return tuple(rng.sample([*tokens(rng, count), rng.choice([GOOD, BAD])], count + 1))


def _two(rng: random.Random, count: int) -> Tokens:
    """Only two words."""
    return tuple(rng.choice([GOOD, BAD]) for _ in range(count))


def _good(reply: Tokens) -> float:
    return float(GOOD in reply)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        pytest.param(_good, _marked, id="this word, and not that"),
        pytest.param(lambda reply: float(reply[0] == GOOD), _two, id="how it begins"),
        pytest.param(lambda reply: (reply.count(GOOD) - reply.count(BAD)) // 4, _two, id="more of one than of another"),
    ],
)
def test_planted_preferences_are_recovered(
    rule: Callable[[Tokens], float], words: Callable[[random.Random, int], Tokens], scorer_path: Path
) -> None:
    judged = learnt(scorer_path, planted(640, 1, rule, words), planted(200, 2, rule, words))
    assert calibration.accuracy(judged.margins) >= 0.95


def test_a_planted_length_bias_is_learnt_without_balancing_and_not_with_it(scorer_path: Path) -> None:
    """The longer wins in 85 of 100 pairs, and what is good in 80, one whatever the other."""
    train = planted(768, 3, _good, _two_marks, longer_wins=0.85, wrong=0.2)
    heldout = planted(300, 4, _good, _two_marks, longer_wins=0.5)
    found = {
        balanced: learnt(scorer_path, train, heldout, length_balance=balanced, epochs=2) for balanced in (False, True)
    }
    bias = {
        balanced: calibration.length_correlation(judged.margins, judged.longer) for balanced, judged in found.items()
    }
    right = {balanced: calibration.accuracy(judged.margins) for balanced, judged in found.items()}
    assert bias[False] > 0.3
    assert abs(bias[True]) < 0.12
    assert right[True] > right[False]
    assert right[True] >= 0.95


def _two_marks(rng: random.Random, count: int) -> Tokens:
    """One word over and over, after a good or a bad one."""
    return (rng.choice([GOOD, BAD]), *(9 for _ in range(count)))
