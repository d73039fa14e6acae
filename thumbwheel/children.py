"""Child processes that are asked to stop when whoever started them is gone (Linux; elsewhere nothing happens)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# In a process of its own rather than between fork and exec, where a process with threads must not run Python: gRPC's
# have crashed there. `sys.argv` is the parent's process id, the program's path, and its arguments.
_LAUNCHER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def tied(*command: str) -> Sequence[str]:
    """The command that runs `command`, a program's path and its arguments, as a child of this process that gets SIGTERM
    when this process ends.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


def die_with_parent() -> None:
    """Asks for SIGTERM when the parent of this process ends."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
