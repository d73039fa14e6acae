"""Writes docs/configuration.md from the settings classes: `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from services.collector.config import CollectorSettings
from services.policy.config import PolicySettings
from services.reward.config import RewardSettings
from thumbwheel.config import Settings
from thumbwheel.demo.config import DemoSettings
from thumbwheel.stack import StackSettings
from trainer.config import TrainerSettings

PROCESSES: dict[str, type[Settings]] = {
    "python -m services.policy": PolicySettings,
    "python -m services.reward": RewardSettings,
    "python -m services.collector": CollectorSettings,
    "python -m trainer": TrainerSettings,
    "thumbwheel up": StackSettings,
    "thumbwheel demo": DemoSettings,
}
HEAD = """# Configuration

Written from the settings classes by `make docs`; do not edit.

A value comes from the flag, else from the environment variable, else it is the default: `--max-tokens 512` and
`THUMBWHEEL_MAX_TOKENS=512` say the same. A value that is out of bounds ends the process at once, with the flag's name.
Flags with a dot share a variable, in JSON: `THUMBWHEEL_CURATION='{"user_votes_per_day": 100}'`.
"""


def _type(annotation: Any) -> str:
    options = [option for option in get_args(annotation) if option is not type(None)]
    if options and all(isinstance(option, str) for option in options):
        return " or ".join(f"`{option}`" for option in options)
    if options:
        return ", ".join(_type(option) for option in options)
    names = {"bool": "yes or no", "int": "whole number", "float": "number", "str": "text", "Path": "path"}
    return names.get(getattr(annotation, "__name__", ""), str(annotation))


def _default(default: Any) -> str:
    if default is None or default == "":
        return "none"
    return "" if str(default) == "PydanticUndefined" else f"`{default}`"


def _rows(settings: type[BaseModel], prefix: str = "--") -> Iterator[str]:
    for name, field in settings.model_fields.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, flag + ".")
            continue
        what = " ".join((field.description or "").split()).replace("|", "\\|")
        default = "in the user's data folder" if name == "home" else _default(field.default)
        yield f"| `{flag}` | {what} | {_type(field.annotation)} | {default} |"


def document() -> str:
    """The page."""
    parts = [HEAD]
    for command, settings in PROCESSES.items():
        parts.append(f"\n## `{command}`\n\n{(settings.__doc__ or '').strip()}\n")
        parts.append("| flag | what | value | default |\n|---|---|---|---|")
        parts += _rows(settings)
        parts[-1] += "\n"
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
