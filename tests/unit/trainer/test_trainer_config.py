"""Settings say what is wrong with them, by name."""

from __future__ import annotations

import pytest

from trainer.config import TrainerSettings


def parse(*flags: str) -> TrainerSettings:
    return TrainerSettings.from_command_line(flags, prog="trainer")


def test_both_tasks_by_default_with_the_papers_numbers() -> None:
    settings = parse()
    assert settings.tasks == ("policy", "reward")
    assert (settings.learning_rate("policy"), settings.learning_rate("reward")) == (1e-6, 1e-5)
    assert (settings.objective("policy"), settings.objective("reward")) == ("dpo", "reward")
    assert (settings.beta, settings.batch_size, settings.round_size) == (0.1, 8, 48)


def test_every_zero_stage_can_be_named() -> None:
    assert [parse("--zero-stage", str(stage)).zero_stage for stage in range(4)] == [0, 1, 2, 3]


def test_tasks_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--tasks", "reward, policy").tasks == ("reward", "policy")
    monkeypatch.setenv("THUMBWHEEL_TASKS", "policy")
    assert parse().tasks == ("policy",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "policy,critic"), "--tasks.1 (or THUMBWHEEL_TASKS.1)"),
        (("--tasks", "policy,policy"), "at most once"),
        (("--beta", "0"), "--beta (or THUMBWHEEL_BETA): Input should be greater than 0"),
        (("--zero-stage", "4"), "--zero-stage"),
        (("--round-size", "0"), "--round-size"),
    ],
)
def test_what_is_wrong_is_named(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
