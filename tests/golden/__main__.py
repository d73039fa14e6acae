"""At a release, after `make golden`: `python -m tests.golden v0.2` keeps bytes of each of its messages."""

from __future__ import annotations

import base64
import json
import sys

from google.protobuf import json_format, message_factory

from tests.releases import ROOT, Release, fill


def main(name: str) -> None:
    """Writes `tests/golden/NAME.jsonl`."""
    lines = []
    for full, descriptor in Release(name).descriptors.items():
        message = fill(message_factory.GetMessageClass(descriptor)())
        data = base64.b64encode(message.SerializeToString(deterministic=True)).decode()
        says = json_format.MessageToDict(message, preserving_proto_field_name=True)
        lines.append(json.dumps({"message": full, "bytes": data, "says": says}, ensure_ascii=False))
    (ROOT / "tests" / "golden" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1])
