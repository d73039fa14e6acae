"""Objectives are found by name, and mixed by weight."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from tests.unit.trainer.samples import make_demonstrations, make_groups, make_samples, make_thumbs
from thumbwheel import errors
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import losses
from trainer.config import TrainerSettings
from trainer.losses.base import Objective, units
from trainer.losses.dpo import Dpo
from trainer.losses.grpo import Grpo
from trainer.losses.kto import Kto
from trainer.losses.mixture import Mixture, Term
from trainer.losses.ppo import Ppo
from trainer.losses.reward import Reward
from trainer.losses.sft import Sft
from trainer.models import ActorCritic
from trainer.samples import Sample

POLICY, REWARD = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD


def mixture(text: str, **settings: object) -> Mixture:
    return losses.objective(text, losses.role_of(text), TrainerSettings.model_validate(settings))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", Dpo("dpo", beta=0.3)),
        ("ipo", Dpo("ipo", beta=0.3)),
        ("cdpo", Dpo("cdpo", beta=0.3)),
        ("robust", Dpo("robust", beta=0.3)),
        ("sigmoid_norm", Dpo("sigmoid_norm", beta=0.3)),
        ("kto", Kto(beta=0.3, seed=0)),
        ("grpo", Grpo("grpo", 0.05, 0.2, 0.5, 5.0, 0.0)),
        ("rloo", Grpo("rloo", 0.05, 0.2, 0.5, 5.0, 0.0)),
        ("sft", Sft()),
        ("reward", Reward()),
    ],
)
def test_objectives_are_found_by_name(name: str, expected: Objective) -> None:
    found = mixture(name, beta=0.3)
    assert found == Mixture((Term(1.0, expected),))
    assert (found.name, found.role) == (name, expected.role)
    assert losses.kind(name) is expected.kind


def test_every_name_makes_an_objective_that_goes_by_it_and_learns_from_what_is_said() -> None:
    for role in (POLICY, REWARD):
        for name in losses.names(role):
            (term,) = losses.objective(name, role, TrainerSettings()).terms
            assert (term.objective.name, term.objective.kind) == (name, losses.kind(name))
            assert term.objective.role == role


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("dpo", {"dpo": 1.0}),
        ("dpo+0.1*sft", {"dpo": 1.0, "sft": 0.1}),
        (" 2 * kto + 1e-2*sft ", {"kto": 2.0, "sft": 0.01}),
        ("dpo+kto+sft+grpo", {"dpo": 1.0, "kto": 1.0, "sft": 1.0, "grpo": 1.0}),
    ],
)
def test_a_mixture_is_a_weighted_sum(text: str, weights: dict[str, float]) -> None:
    assert losses.parse(text, POLICY, field="objective") == weights
    found = mixture(text)
    assert {term.objective.name: term.weight for term in found.terms} == weights
    assert losses.parse(found.name, POLICY, field="objective") == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward", r"objective: is 'reward', in which 'reward' is no objective of this role. Use one of dpo, ipo"),
        ("dpo+", "in which '' is no objective"),
        ("", "in which '' is no objective"),
        ("0.1 sft", "in which '0.1 sft' is no objective"),
        ("dpo+-1*sft", r"in which '-1\*sft' is no objective"),
        ("0*sft", "in which 0 is no weight. Use 0.1"),
        ("1.2.3*sft", "in which 1.2.3 is no weight"),
        ("dpo+0.5*dpo", "has dpo twice"),
    ],
)
def test_what_is_no_mixture_is_named(text: str, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        losses.parse(text, POLICY, field="objective")


def test_each_term_learns_from_its_own_kind() -> None:
    found = mixture("dpo+0.5*kto+0.1*sft")
    samples: list[Sample] = [*make_samples(3), *make_thumbs(4), *make_demonstrations(2), *make_groups(1)]
    assert [len(term.mine(samples)) for term in found.terms] == [3, 4, 2]
    assert [found.learns_from(sample) for sample in samples] == [True] * 9 + [False]
    # The pairs, the thumbs and their mismatched pairs, but no demonstration.
    assert len(found.referenced(samples)) == 3 + 2 * 4
    assert mixture("sft").referenced(samples) == []
    assert sum(map(units, samples)) == 3 + 4 + 2 + 4


def test_the_lineage_of_a_mixture_says_whose_setting_it_is() -> None:
    settings = mixture("dpo+0.1*sft+grpo", beta=0.2).settings()
    assert settings["dpo.beta"] == "0.2"
    assert settings["sft.weight"] == "0.1"
    assert (settings["grpo.clip_range"], settings["grpo.weight"]) == ("0.2", "1.0")
    assert mixture("dpo", beta=0.2).settings() == {"beta": "0.2"}


def test_who_brings_a_model_of_its_own_kind_serves_the_others(policy_path: Path) -> None:
    found = mixture("0.1*sft+ppo")
    model = found.load(policy_path)
    assert isinstance(model, ActorCritic)
    assert isinstance(found.terms[1].objective, Ppo)
    assert [group.learning_rate for group in found.parameter_groups(model, 1e-6)] == [1e-6, 9e-6]


def test_reference_is_wanted_only_where_something_compares_with_it() -> None:
    assert mixture("dpo+sft").needs_reference
    assert mixture("grpo").needs_reference
    assert not mixture("grpo", kl_weight=0.0).needs_reference
    assert not mixture("sft").needs_reference
    assert math.isfinite(mixture("sft").terms[0].weight)


def test_names_are_listed_without_torch() -> None:
    import subprocess

    code = "import sys; from trainer import losses; print(losses.names(1), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip().endswith("False")
