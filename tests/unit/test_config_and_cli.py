"""Settings say what is wrong; help answers without loading a model library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thumbwheel.config import Settings, split_address
from thumbwheel.stack import StackSettings

HEAVY = ("torch", "vllm", "deepspeed", "transformers", "kafka", "sqlalchemy", "matplotlib")
ENTRY_POINTS = ("services.policy", "services.reward", "services.collector", "trainer", "thumbwheel.stream.broker")


def test_flags_go_before_variables_and_those_before_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THUMBWHEEL_METRICS_PORT", "7")
    monkeypatch.setenv("THUMBWHEEL_LISTEN", "0.0.0.0:1")
    settings = Settings.from_command_line(["--metrics-port", "8", "--home", str(tmp_path)], prog="x")
    assert (settings.metrics_port, settings.listen, settings.log_level) == (8, "0.0.0.0:1", "info")
    assert settings.store_path == tmp_path / "store"
    with pytest.raises(ValueError, match="frozen"):
        settings.metrics_port = 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "nowhere"], "--listen (or THUMBWHEEL_LISTEN): Value error, 'nowhere' is not host:port"),
        (["--metrics-port", "70000"], "--metrics-port"),
        (["--log-level", "loud"], "--log-level (or THUMBWHEEL_LOG_LEVEL)"),
        (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
    ],
)
def test_a_wrong_value_names_its_flag(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Settings.from_command_line(arguments, prog="x")
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_addresses_follow_from_the_base_port() -> None:
    at = StackSettings(base_port=40000).addresses
    assert (at.policy, at.trainer, at.kafka) == ("127.0.0.1:40001", "127.0.0.1:40004", "127.0.0.1:40009")
    assert at.metrics_port("policy") == 40051
    assert at.parts == ("policy", "reward", "collector", "trainer", "broker")
    assert (at.reference, at.policies) == ("", at.policy)
    beside = StackSettings(base_port=40000, serve_reference=True).addresses
    assert beside.parts == (*at.parts, "reference")
    assert (beside.reference, beside.metrics_port("reference")) == ("127.0.0.1:40005", 40056)
    assert beside.policies == "127.0.0.1:40001,127.0.0.1:40005"
    elsewhere = StackSettings(kafka="kafka-1:9092,kafka-2:9092").addresses
    assert elsewhere.kafka == "kafka-1:9092,kafka-2:9092"
    assert "broker" not in elsewhere.parts
    assert split_address("[::1]:80") == ("[::1]", 80)


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_needs_no_heavy_library(module: str) -> None:
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--metrics-port" in done.stdout
    assert "loaded []" in done.stdout


def test_the_command_line_needs_no_heavy_library() -> None:
    probe = f"import sys, thumbwheel.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
