"""Who imports a file at a terminal sees how far it is."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thumbwheel.auth import create_keys

ROWS = 1_500


@pytest.mark.timeout(120)
def test_an_import_at_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "pairs.jsonl.gz"
    create_keys(home / "keys")
    with gzip.open(file, "wt") as out:
        for number in range(ROWS):
            asked = f"\n\nHuman: {os.urandom(30).hex()}\n\nAssistant:"
            out.write(json.dumps({"chosen": f"{asked} yes, {number}", "rejected": f"{asked} no"}) + "\n")
    command = [sys.executable, "-m", "thumbwheel.cli", "import", str(file), "--home", str(home)]
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=os.environ | {"TERM": "xterm-256color"}
    ) as process:
        os.close(terminal)
        shown = _all_of(screen)
        assert process.stdout is not None
        said = process.stdout.read().decode()
    assert process.returncode == 0, shown
    assert f"{ROWS}" in said
    assert "importing pairs.jsonl.gz" in shown
    shares = [int(share) for share in re.findall(r"(\d+)%", shown)]
    assert shares == sorted(shares), "it goes forward"
    assert shares[-1] == 100, "of the compressed file"
    assert any(0 < share < 100 for share in shares), "there is something to see before the end"


def _all_of(screen: int) -> str:
    """What is written on a terminal until nobody has it open."""
    written = b""
    try:
        while some := os.read(screen, 65_536):
            written += some
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(screen)
    return written.decode()
