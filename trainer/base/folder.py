"""Whether a folder holds a model that can be served and trained."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from thumbwheel import errors

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_INDEX = "model.safetensors.index.json"
_REMEDY = "Type: thumbwheel model fetch PATH with a complete folder, or thumbwheel model fetch for the default model."


def check_folder(folder: Path) -> Path:
    """The absolute path of a folder with `config.json`, safetensors and a tokenizer.

    Weights are not read, but must be as long as their header says. Raises `errors.MissingModel` naming what is missing,
    `errors.CorruptCheckpoint` naming a file that is truncated or not what its name says.
    """
    if not folder.is_dir():
        raise errors.MissingModel(f"There is no folder {folder}.", remedy=_REMEDY)
    if not (folder / "config.json").is_file():
        raise errors.MissingModel(f"{folder / 'config.json'} is missing.", remedy=_REMEDY)
    _read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        # Shards that the index names must all be there: a download that was cut off has some.
        shards = _read_json(folder / _INDEX).get("weight_map", {})
        weights = [folder / name for name in sorted(set(shards.values()))]
    if not weights:
        raise errors.MissingModel(
            f"{folder / 'model.safetensors'} is missing: weights must be safetensors, pickled ones are never loaded.",
            remedy=_REMEDY,
        )
    for path in weights:
        _check_length(path)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise errors.MissingModel(f"{folder / _TOKENIZERS[0]} is missing: a model needs its tokenizer.", remedy=_REMEDY)
    return folder.resolve()


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, and the tensors that the header places."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise _truncated(path)
            header = json.loads(file.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError:
        raise errors.MissingModel(f"{path} is missing.", remedy=_REMEDY) from None
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _truncated(path) from error
    if 8 + length + end != size:
        raise _truncated(path)


def _truncated(path: Path) -> errors.CorruptCheckpoint:
    return errors.CorruptCheckpoint(f"{path} is truncated, or not a safetensors file.", remedy=_REMEDY)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise errors.CorruptCheckpoint(f"{path} is not JSON: {error}.", remedy=_REMEDY) from error
    if not isinstance(content, dict):
        raise errors.CorruptCheckpoint(f"{path} is not a JSON object.", remedy=_REMEDY)
    return content
