"""What an engine computes in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from services import engine


@pytest.mark.parametrize(
    ("on_cpu", "instructions", "expected"),
    [(True, False, "float32"), (True, True, "bfloat16"), (False, False, "bfloat16")],
)
def test_a_processor_without_instructions_for_bf16_computes_in_fp32(
    on_cpu: bool, instructions: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: instructions))
    monkeypatch.setattr(torch, "ops", operations)
    assert engine.computing_dtype(on_cpu=on_cpu) == expected
