"""`python -m services.collector`: reads the settings, then loads the rest and serves."""

from __future__ import annotations

from services.collector.config import CollectorSettings


def main() -> None:
    """Serves until SIGTERM."""
    settings = CollectorSettings.from_command_line(prog="python -m services.collector")

    from services.collector.service import collect
    from thumbwheel import serving, telemetry

    telemetry.start("collector", settings)
    serving.run("collector", collect(settings))


if __name__ == "__main__":
    main()
