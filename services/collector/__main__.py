"""`python -m services.collector`: reads the settings, then loads the rest and serves."""

from __future__ import annotations

import sys

from services.collector.config import CollectorSettings

SWITCH_SECONDS = 0.0005


def main() -> None:
    """Serves until SIGTERM."""
    settings = CollectorSettings.from_command_line(prog="python -m services.collector")

    from services.collector.service import collect
    from thumbwheel import serving, telemetry

    # The door's thread is never long without the interpreter: an acknowledgement waits for it.
    sys.setswitchinterval(SWITCH_SECONDS)
    telemetry.start("collector", settings)
    serving.run("collector", collect(settings))


if __name__ == "__main__":
    main()
