"""LoRA learns beside frozen weights; merged and as an adapter it is the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.trainer.samples import make_samples, with_sums
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import losses, models
from trainer.config import TrainerSettings
from trainer.learner import Learner

pytestmark = pytest.mark.usefixtures("one_rank")


def learner(path: Path, name: str = "dpo", steps_done: int = 0) -> Learner:
    settings = TrainerSettings(batch_size=4, lora_rank=4, beta=0.5)
    role = losses.role_of(name)
    return Learner(losses.objective(name, role, settings), path, settings, learning_rate=1e-2, steps_done=steps_done)


def test_merged_weights_and_adapter_are_the_model_that_learnt(policy_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    samples = make_samples(8)
    reference = with_sums(samples, -40.0, -42.0)
    made = learner(policy_path)
    before = made.probe([5, 6, 7], [8, 9])
    assert before == pytest.approx(models.continuation_logprobs(models.load_causal(policy_path), [5, 6, 7], [8, 9]))
    reports = made.learn(samples, reference, round_number=1)
    assert reports["grad_norm"] > 0
    probe = made.probe([5, 6, 7], [8, 9])
    assert probe != pytest.approx(before, abs=0.05)
    for folder in ("merged", "adapter"):
        (tmp_path / folder).mkdir()
    made.write_model(tmp_path / "merged")
    made.write_adapter(tmp_path / "adapter")
    made.close()

    base, merged = load_file(policy_path / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name.rsplit(".", 2)[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    found = models.continuation_logprobs(models.load_causal(tmp_path / "merged"), [5, 6, 7], [8, 9])
    assert found == pytest.approx(probe, abs=0.2)  # W + BA is rounded to bf16 once more

    whole = PeftModel.from_pretrained(models.load_causal(policy_path), str(tmp_path / "adapter")).merge_and_unload()
    for name, weights in whole.state_dict().items():
        if name in merged:
            torch.testing.assert_close(weights, merged[name], rtol=0.01, atol=0.002)


def test_a_restart_changes_no_bit_and_only_the_matrices_are_saved(policy_path: Path, tmp_path: Path) -> None:
    samples = make_samples(8)
    reference = with_sums(samples, -40.0, -42.0)
    (tmp_path / "checkpoint").mkdir()
    straight = learner(policy_path)
    straight.learn(samples[:4], reference, round_number=1)
    straight.save(tmp_path / "checkpoint").wait()
    straight.learn(samples[4:], reference, round_number=2)
    straight.write_model(tmp_path / "straight")
    straight.close()
    resumed = learner(policy_path, steps_done=1)
    resumed.restore(tmp_path / "checkpoint")
    resumed.learn(samples[4:], reference, round_number=2)
    resumed.write_model(tmp_path / "resumed")
    resumed.close()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    saved = load_file(tmp_path / "checkpoint" / "rank-00000.safetensors")
    assert {name.split(".")[-3] for name in saved if ":" in name} == {"lora_A", "lora_B"}


def test_a_reward_model_learns_its_head_as_well(reward_path: Path, tmp_path: Path) -> None:
    assert losses.role_of("reward") == ModelRole.MODEL_ROLE_REWARD
    made = learner(reward_path, "reward")
    made.learn(make_samples(8), {}, round_number=1)
    made.write_model(tmp_path / "merged")
    made.close()
    base, merged = load_file(reward_path / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    assert not torch.equal(base["score.weight"], merged["score.weight"])
    assert torch.equal(base["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
