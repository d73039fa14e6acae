"""Prints the packages that an image does not need, of all that are installed: `python requirements/image.py trainer`.

Run where all of the locks is installed, as the first stage of the Dockerfile does: an image is made by taking away.
What a package asks for is read from its own metadata; what the locks leave out (see lock.py) stays out.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"collector": (), "broker": (), "policy": ("cpu",), "reward": ("cpu",), "trainer": ("trainer",)}
"""Images, and the extras of pyproject.toml that each needs."""


def installed() -> set[str]:
    """Names of all packages that are there."""
    return {canonicalize_name(one.metadata["Name"]) for one in metadata.distributions()}


def needed(role: str) -> set[str]:
    """Names of all that an image needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(t for extra in EXTRAS[role] for t in project["optional-dependencies"][extra])]
    known, seen = installed(), set[tuple[str, str]]()
    queue = [Requirement(text) for text in texts]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in known:
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in metadata.requires(name) or ():
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    queue.append(further)
    return {name for name, _ in seen}


def main() -> None:
    """Prints what the role that is named does not need."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        sys.exit(f"image: name one of {', '.join(EXTRAS)}")
    print("\n".join(sorted(installed() - needed(sys.argv[1]) - {"thumbwheel"})))


if __name__ == "__main__":
    main()
