"""What must never be in a log: `leaks` names what is, without showing it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PATTERNS = {
    "an API key": re.compile(r"\btw_[0-9a-f]{12}_[A-Za-z0-9_-]{43}\b"),
    "a private key": re.compile(r"BEGIN [A-Z ]*PRIVATE KEY"),
    "a password in a URL": re.compile(r"\b[a-z+]+://[^\s:/@\"']+:(?!\*+@)[^\s:/@\"']+@"),
    "a bearer token": re.compile(r"(?i)\bbearer\s+(?!tw_\.\.\.)[A-Za-z0-9_.-]{16,}"),
}


def kept(folder: Path) -> Iterator[str]:
    """The secrets in all key files below a folder: whole, and line by line where they have several."""
    for name in ("receipt.key", "manifest.key"):
        for path in folder.rglob(name):
            lines = path.read_text(errors="replace").split("\n")
            yield from (line.strip() for line in lines if len(line.strip()) >= 32 and "KEY" not in line)


def leaks(text: str, secrets: Iterable[str] = ()) -> list[str]:
    """What of it is in a text."""
    found = [what for what, pattern in PATTERNS.items() if pattern.search(text)]
    return found + ["a key of the deployment" for secret in secrets if secret in text]
