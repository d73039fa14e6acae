"""The conversion of a real, if tiny, GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from thumbwheel import errors
from trainer.base.folder import check_folder
from trainer.base.wheel import SMOLLM2


def test_a_gguf_file_becomes_a_model_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    embedding = write_gguf(tmp_path / "tiny.gguf")
    SMOLLM2.convert(tmp_path / "tiny.gguf", folder)
    assert check_folder(folder) == folder

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == 1
    assert loaded.generation_config.pad_token_id == 1
    expected = torch.from_numpy(embedding).to(torch.bfloat16)
    torch.testing.assert_close(loaded.get_input_embeddings().weight.detach(), expected, rtol=0, atol=0.02)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<start>hi<end>"
    assert tokenizer.decode(tokenizer("hi")["input_ids"]) == "hi"


def test_a_file_that_is_no_gguf_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no gguf")
    with pytest.raises(errors.Internal, match=r"Converting .*model\.gguf failed \(exit status 1\): \w+"):
        SMOLLM2.convert(tmp_path / "model.gguf", tmp_path)


def write_gguf(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Writes a quantised one-layer Llama with a byte-level tokenizer; returns its embedding."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    hidden, inner, vocab = 32, 64, 288
    tokens = ["<start>", "<end>", *bytes_to_unicode().values(), "hi"]
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    special = [t.startswith("<") and len(t) > 1 for t in tokens]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Name Of Its Own")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if s else gguf.TokenType.NORMAL for s in special])
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}")
    random = np.random.default_rng(0)

    def put(name: str, *shape: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        values: np.ndarray[tuple[int, int], np.dtype[np.float32]] = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        return values

    embedding = put("token_embd", vocab, hidden)
    put("output_norm", hidden)
    for norm in ("attn_norm", "ffn_norm"):
        put(f"blk.0.{norm}", hidden)
    for name, shape in {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
        "attn_v": (hidden // 2, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }.items():
        put(f"blk.0.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding
