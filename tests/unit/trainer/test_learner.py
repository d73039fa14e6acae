"""The learner lowers its loss, adds up gradients rightly, and goes on bit for bit where it was."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.unit.trainer.samples import (
    make_demonstrations,
    make_groups,
    make_sample,
    make_samples,
    make_thumbs,
    with_sums,
)
from thumbwheel import errors
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import batch, losses, models, runtime
from trainer.config import TrainerSettings
from trainer.inference import Reference, reference_logprobs
from trainer.learner import Learner, StepReport
from trainer.losses.base import PerSample
from trainer.losses.mixture import Mixture
from trainer.runtime import Stopped
from trainer.samples import Sample

pytestmark = pytest.mark.usefixtures("one_rank")

POLICY, REWARD = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD


def settings_with(**changes: object) -> TrainerSettings:
    return TrainerSettings.model_validate({"batch_size": 4, "micro_batch_tokens": 80, "beta": 0.5, **changes})


def dpo(settings: TrainerSettings) -> Mixture:
    return losses.objective("dpo", POLICY, settings)


def weights(learner: Learner, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    learner.write_model(folder)
    return load_file(folder / "model.safetensors")


def one_step(
    path: Path, samples: Sequence[Sample], settings: TrainerSettings, reference: PerSample
) -> tuple[StepReport, list[StepReport]]:
    learner = Learner(dpo(settings), path, settings, learning_rate=1e-3)
    reports: list[StepReport] = []
    learner.learn(samples, reference, round_number=1, on_step=reports.append)
    learner.close()
    return reports[0], reports


def test_dpo_lowers_its_loss_and_widens_the_margin(policy_path: Path) -> None:
    settings = settings_with(epochs=8, batch_size=8, micro_batch_tokens=200)
    samples = make_samples(8)
    reference = reference_logprobs(policy_path, samples, max_tokens=80)
    _, reports = one_step(policy_path, samples, settings, reference)
    assert [report.step for report in reports] == list(range(1, 9))
    assert reports[0].loss == pytest.approx(math.log(2), abs=0.02)
    assert reports[0].measures["margin"] == pytest.approx(0.0, abs=0.05)
    assert reports[-1].loss < 0.2
    assert reports[-1].measures["margin"] > 2.0
    assert reports[-1].measures["accuracy"] == 1.0


def test_the_reward_model_learns_to_rank(reward_path: Path) -> None:
    settings = settings_with(epochs=8, batch_size=8)
    learner = Learner(losses.objective("reward", REWARD, settings), reward_path, settings, learning_rate=1e-3)
    reports: list[StepReport] = []
    learner.learn(make_samples(8), {}, round_number=1, on_step=reports.append)
    learner.close()
    # The loss has the ensemble's in it, whose members learn on their own, each from its half of the pairs.
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].measures["margin"] > reports[0].measures["margin"] + 2.0
    assert reports[-1].measures["accuracy"] == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"cpu_offload": True, "zero_stage": 1},
        {"cpu_offload": True, "zero_stage": 2},
        {"cpu_offload": True, "zero_stage": 3},
    ],
)
def test_micro_batches_add_up_to_the_gradient_of_the_step(changes: dict[str, object], policy_path: Path) -> None:
    """Also where activations are computed again, and where the optimizer is kept apart from the weights."""
    samples = make_samples(8)
    reports = []
    for tokens in (1, 60, 10_000):
        settings = settings_with(batch_size=8, micro_batch_tokens=tokens, **changes)
        reference = with_sums(samples, -40.0, -42.0)
        reports.append(one_step(policy_path, samples, settings, reference)[0])
    for report in reports[1:]:
        assert report.loss == pytest.approx(reports[0].loss, rel=0.02)
        assert report.grad_norm == pytest.approx(reports[0].grad_norm, rel=0.03)


def test_unless_told_passes_take_what_suits_the_device(policy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int] = []
    plain = batch.shared

    def noted(samples: Sequence[Sample], max_tokens: int, rank: int, ranks: int) -> list[tuple[list[batch.Row], bool]]:
        budgets.append(max_tokens)
        return plain(samples, max_tokens, rank, ranks)

    monkeypatch.setattr(batch, "shared", noted)
    samples = make_samples(4)
    one_step(policy_path, samples, settings_with(micro_batch_tokens=0), with_sums(samples, -40.0, -42.0))
    assert budgets == [runtime.pass_tokens(0)]


def test_a_sample_that_weighs_twice_counts_twice(policy_path: Path) -> None:
    settings = settings_with(micro_batch_tokens=10_000)
    single, double = (make_sample(random.Random(3), weight=weight) for weight in (1.0, 2.0))
    norms = [
        one_step(policy_path, [sample], settings, with_sums([sample], -40.0, -42.0))[0].grad_norm
        for sample in (single, double)
    ]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)


def test_prompt_tokens_get_no_loss(policy_path: Path) -> None:
    """What the model says after each prompt token but the last does not change the loss, so it gets no gradient."""
    model = models.load_causal(policy_path).float()
    sample = make_sample(random.Random(0), prompt=7, chosen=3, rejected=4)
    gradients: list[torch.Tensor] = []
    model.model.norm.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
    models.response_logprobs(model, batch.collate(batch.whole([sample]))).sum().backward()  # type: ignore[no-untyped-call]
    norms = gradients[0][0].norm(dim=-1)
    predicts = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    assert (norms[~predicts] == 0).all()
    assert (norms[predicts] > 0).all()


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_restart_between_rounds_changes_no_bit(
    role: str, policy_path: Path, reward_path: Path, tmp_path: Path
) -> None:
    settings = settings_with(warmup_steps=3)
    objective = dpo(settings) if role == "policy" else losses.objective("reward", REWARD, settings)
    path = policy_path if role == "policy" else reward_path
    samples = make_samples(16)
    reference = with_sums(samples, -40.0, -42.0)
    rounds = [samples[:8], samples[8:]]

    straight = Learner(objective, path, settings, learning_rate=1e-3)
    for number, part in enumerate(rounds, 1):
        straight.learn(part, reference, round_number=number)
    expected = weights(straight, tmp_path / "straight")
    straight.close()

    first = Learner(objective, path, settings, learning_rate=1e-3)
    first.learn(rounds[0], reference, round_number=1)
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint").wait()
    middle = weights(first, tmp_path / "first")
    first.close()
    second = Learner(objective, path, settings, learning_rate=1e-3, steps_done=first.steps_done)
    second.restore(tmp_path / "checkpoint")
    second.learn(rounds[1], reference, round_number=2)
    resumed = weights(second, tmp_path / "second")
    second.close()

    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], middle[name]) for name in expected)


def test_nothing_is_written_in_the_time_of_grace_until_the_next_round(policy_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    samples, settings = make_samples(16), settings_with()
    reference = with_sums(samples, -40.0, -42.0)

    def start() -> Learner:
        return Learner(mixture("dpo", settings), policy_path, settings, learning_rate=1e-3)

    learner = start()
    learner.learn(samples[:8], reference, round_number=1)
    expected = weights(learner, tmp_path / "expected")
    (tmp_path / "checkpoint").mkdir()
    writing = learner.save(tmp_path / "checkpoint", tmp_path / "model", grace=60.0)
    learner.saver.model_saved.result(60.0)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(expected[name], saved[name]) for name in expected)
    assert not writing.idle
    assert list((tmp_path / "checkpoint").iterdir()) == []
    learner.learn(samples[8:], reference, round_number=2)  # it changes what is being saved, but not before it is read
    writing.wait()
    learner.close()
    restored = start()
    restored.restore(tmp_path / "checkpoint")
    found = weights(restored, tmp_path / "found")
    restored.close()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_reference_pass_equals_the_models_own_logprobs(policy_path: Path) -> None:
    samples = make_samples(5)
    reference = reference_logprobs(policy_path, samples, max_tokens=80)
    model = models.load_causal(policy_path).eval()
    for sample in samples:
        own = [
            logprob
            for response in sample.responses
            for logprob in models.continuation_logprobs(model, sample.prompt, response)
        ]
        assert reference[sample.id].tolist() == pytest.approx(own, rel=0.1, abs=0.1)


def test_a_reference_that_stays_in_memory_says_what_one_that_is_read_anew_says(
    policy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Mock(wraps=models.load_causal)
    monkeypatch.setattr(models, "load_causal", load)
    first, second = make_samples(5), make_samples(8)[5:]
    other = shutil.copytree(policy_path, tmp_path / "other")
    kept = Reference(keep=True)
    for path, samples in ((policy_path, first), (policy_path, second), (other, second)):
        found = kept.logprobs(path, samples, max_tokens=80)
        expected = reference_logprobs(path, samples, max_tokens=80)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[id], expected[id]) for id in expected)
    kept.close()
    loaded = [call.args[0] for call in load.call_args_list]
    assert loaded == [policy_path, policy_path, policy_path, other, other], "kept: of the first two, one"


def test_a_long_sample_recomputes_its_activations_and_learns_the_same(policy_path: Path) -> None:
    sample = make_sample(random.Random(0), prompt=30, chosen=20, rejected=20)
    norms = [
        one_step(policy_path, [sample], settings_with(micro_batch_tokens=tokens), with_sums([sample], -99.0, -99.0))[0]
        for tokens in (10, 10_000)
    ]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("value", "told"), [(math.nan, "nan"), (1e9, r"\d+\.\d+")])
def test_divergence_is_an_error_that_says_what_to_do(value: float, told: str, policy_path: Path) -> None:
    settings = settings_with()
    samples = make_samples(4)
    learner = Learner(dpo(settings), policy_path, settings, learning_rate=1e-3)
    with pytest.raises(errors.Internal, match=rf"loss is {told} at step 1 .*not published.*Lower the learning rate"):
        learner.learn(samples, with_sums(samples, value, 0.0), round_number=1)
    learner.close()


def test_being_stopped_gives_the_round_up(policy_path: Path) -> None:
    settings = settings_with()
    samples = make_samples(8)
    learner = Learner(dpo(settings), policy_path, settings, learning_rate=1e-3)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    with pytest.raises(Stopped):
        learner.learn(samples, with_sums(samples, -40.0, -42.0), round_number=1, stop=stop)
    assert learner.steps_done < 2
    learner.close()


def mixture(text: str, settings: TrainerSettings) -> Mixture:
    return losses.objective(text, POLICY, settings)


def learn(text: str, samples: Sequence[Sample], path: Path, **changes: object) -> tuple[list[StepReport], Learner]:
    settings = settings_with(**changes)
    objective = mixture(text, settings)
    wanted = objective.referenced(samples)
    reference = reference_logprobs(path, wanted, max_tokens=80) if wanted else {}
    learner = Learner(objective, path, settings, learning_rate=1e-3)
    reports: list[StepReport] = []
    learner.learn(samples, reference, round_number=1, on_step=reports.append)
    return reports, learner


@pytest.mark.parametrize("text", ["kto", "ppo", "grpo", "dpo+0.5*kto+0.1*sft"])
def test_every_objective_lowers_its_loss(text: str, policy_path: Path) -> None:
    samples: list[Sample] = [*make_samples(4), *make_thumbs(6), *make_demonstrations(4), *make_groups(4)]
    reports, learner = learn(text, samples, policy_path, epochs=8, batch_size=24, micro_batch_tokens=400)
    learner.close()
    assert reports[-1].loss < reports[0].loss - 0.02
    if text == "kto":
        assert reports[-1].measures["chosen_reward"] > reports[-1].measures["rejected_reward"]
    if text == "grpo":
        # At first nothing has moved, so nothing is clipped.
        assert reports[0].measures["clip_fraction"] == 0.0
        assert reports[-1].measures["clip_fraction"] > 0.0


@pytest.mark.parametrize("text", ["dpo", "ppo"])
def test_a_mixture_is_the_sum_of_its_terms(text: str, policy_path: Path) -> None:
    """By its loss; and by its gradient, which is that of one term where the other's weight is next to nothing."""
    samples: list[Sample] = [*make_samples(4), *make_groups(2), *make_demonstrations(3)]
    found = {}
    for mixed in (text, "sft", f"{text}+0.5*sft", f"{text}+1e-6*sft", f"1e-6*{text}+sft"):
        (report,), learner = learn(mixed, samples, policy_path, batch_size=12, micro_batch_tokens=400)
        learner.close()
        found[mixed] = report
    both, alone = found[f"{text}+0.5*sft"], found[text]
    assert both.loss == pytest.approx(alone.loss + 0.5 * found["sft"].loss, rel=1e-5)
    expected = {f"{text}_{name}": value for name, value in {"loss": alone.loss, **alone.measures}.items()}
    expected |= {f"sft_{name}": value for name, value in {"loss": found["sft"].loss, **found["sft"].measures}.items()}
    assert both.measures == pytest.approx(expected, rel=1e-5)
    assert found[f"{text}+1e-6*sft"].grad_norm == pytest.approx(alone.grad_norm, rel=0.02)
    assert found[f"1e-6*{text}+sft"].grad_norm == pytest.approx(found["sft"].grad_norm, rel=0.02)


@pytest.mark.parametrize("text", ["ppo", "grpo"])
def test_rollouts_over_several_rows_have_the_gradient_of_one(text: str, policy_path: Path) -> None:
    norms = []
    for tokens in (1, 60, 10_000):
        (report,), learner = learn(text, make_groups(3), policy_path, batch_size=4, micro_batch_tokens=tokens)
        learner.close()
        norms.append(report.grad_norm)
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=0.03)


@pytest.mark.parametrize(("decay", "rates"), [("none", [1.0, 1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5, 0.25])])
def test_the_rate_falls_over_a_round_where_it_is_to(
    decay: str, rates: list[float], reward_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_with(learning_rate_decay=decay, batch_size=2)
    learner = Learner(losses.objective("reward", REWARD, settings), reward_path, settings, learning_rate=1e-3)
    seen: list[float] = []
    step = learner._engine.step

    def noted(given: list[float]) -> float:
        seen.append(given[0])
        return step(given)

    monkeypatch.setattr(learner._engine, "step", noted)
    for number in (1, 2):
        learner.learn(make_samples(8), {}, round_number=number)
    learner.close()
    assert [rate / 1e-3 for rate in seen] == pytest.approx([*rates, *rates]), "each round anew"


def test_ppo_goes_on_bit_for_bit_with_its_critic_and_its_kl_weight(policy_path: Path, tmp_path: Path) -> None:
    settings = settings_with(kl_target=0.5, kl_horizon=10, critic_warmup_steps=1, batch_size=2, micro_batch_tokens=400)
    objective, rounds = mixture("ppo", settings), (make_groups(4)[:2], make_groups(4)[2:])
    reference = reference_logprobs(policy_path, make_groups(4), max_tokens=400)

    def start(steps_done: int = 0) -> Learner:
        return Learner(objective, policy_path, settings, learning_rate=1e-3, steps_done=steps_done)

    straight = start()
    before = weights(straight, tmp_path / "before")
    first = straight.learn(rounds[0], reference, round_number=1)
    after = weights(straight, tmp_path / "after")
    # While the critic warms up, the policy stays as it is.
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "checkpoint").mkdir()
    straight.save(tmp_path / "checkpoint").wait()
    second = straight.learn(rounds[1], reference, round_number=2)
    expected = weights(straight, tmp_path / "straight")
    straight.close()
    assert first["kl_weight"] == 0.05
    # KL was zero, so e is −0.2, over 8 responses of a horizon of 10.
    assert second["kl_weight"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 10))

    resumed = start(steps_done=1)
    resumed.restore(tmp_path / "checkpoint")
    again = resumed.learn(rounds[1], reference, round_number=2)
    found = weights(resumed, tmp_path / "resumed")
    resumed.close()
    assert {k: v for k, v in again.items() if k != "learn_seconds"} == {
        k: v for k, v in second.items() if k != "learn_seconds"
    }
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not all(torch.equal(expected[name], before[name]) for name in expected)


def test_samples_of_no_use_are_an_error(policy_path: Path) -> None:
    settings = settings_with()
    learner = Learner(mixture("kto", settings), policy_path, settings, learning_rate=1e-3)
    with pytest.raises(errors.FailedPrecondition, match="None of the samples is of a kind that kto learns from"):
        learner.learn(make_samples(2), {}, round_number=1)
    learner.close()
