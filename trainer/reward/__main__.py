"""`python -m trainer.reward init` and `python -m trainer.reward report VERSION`, as `thumbwheel reward` runs them."""

from __future__ import annotations

import signal
import sys
import threading

from thumbwheel import errors, telemetry
from trainer import runtime
from trainer.reward.config import InitSettings, ReportSettings


def main(arguments: list[str], stop: threading.Event) -> None:
    """Runs the command that the arguments name. Ends the process where it cannot be done."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    prog = f"thumbwheel reward {command}"
    runtime.before_imports()
    if command == "init":
        settings = InitSettings.from_command_line(rest, prog=prog)
        telemetry.setup_logging("trainer", settings.log_level)
        from trainer.reward import init

        init.run(settings, stop.is_set)
    elif command == "report":
        named = rest if not rest or rest[0].startswith("-") else ["--version", *rest]
        report_settings = ReportSettings.from_command_line(named, prog=prog)
        telemetry.setup_logging("trainer", report_settings.log_level)
        from trainer.reward import report

        report.run(report_settings, stop.is_set)
    else:
        raise SystemExit("thumbwheel reward: type `thumbwheel reward init --help` or `thumbwheel reward report --help`")


if __name__ == "__main__":
    asked_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.set())
    try:
        main(sys.argv[1:], asked_to_stop)
    except runtime.Stopped:
        raise SystemExit("Stopped: nothing was published.") from None
    except errors.ThumbwheelError as error:
        raise SystemExit(f"thumbwheel reward: {error}") from None
