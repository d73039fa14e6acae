"""The real collector forgets a user: a byte scan of every file in its home finds nothing, whatever happened before."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from tests.support import Process, free_port
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from tests.unit.services.collector.rights.test_rights_forget import asked_by, found_in
from thumbwheel.stack import STATE_FILE, StackSettings
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Record
from thumbwheel.v1 import preference_pb2_grpc
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, GenerationEvent
from thumbwheel.v1.preference_pb2 import (
    Feedback,
    FeedbackState,
    ForgetRequest,
    ForgetResponse,
    GetFeedbackRequest,
    SubmitFeedbackRequest,
)

SECONDS = 30.0
SECRETS = ("ann-user-4e1d", "mine-51c9", "edit-77aa", "comment-03bb", "held-61f0")


class Stack:
    """A broker and a collector, and their client."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.deployment = Deployment.at(home)
        self.broker = EmbeddedBroker(port=free_port(), log=home / "broker.log")
        self.broker.start()
        self.log = open_log(self.broker.bootstrap_servers)
        arguments = ["--home", str(home), "--bootstrap-servers", self.broker.bootstrap_servers]
        self.control = f"127.0.0.1:{free_port()}"
        arguments += ["--control-listen", self.control]
        self.collector = Process("services.collector", [*arguments, "--log-level", "debug"], home / "collector.log")
        self.collector.start().wait_serving()

    def close(self) -> None:
        self.collector.kill()
        self.log.close()
        self.broker.kill()

    def call(self, method: str, request: object, timeout: float = SECONDS) -> object:
        with grpc.insecure_channel(self.control if method == "Forget" else self.collector.address) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            return getattr(stub, method)(request, timeout=timeout, wait_for_ready=True)

    def submit(self, feedback: Feedback) -> str:
        answer = self.call("SubmitFeedback", SubmitFeedbackRequest(feedback=feedback))
        return str(answer.feedback_id)  # type: ignore[attr-defined]  # one stub for all methods

    def forget(self, user: str) -> ForgetResponse:
        answer = self.call("Forget", ForgetRequest(user_id=user))
        assert isinstance(answer, ForgetResponse)
        return answer

    def publish(self, *events: GenerationEvent) -> None:
        producer = self.log.producer()
        for event in events:
            producer.send(topics.GENERATIONS, event.generation.prompt_id.encode(), event.SerializeToString())
        producer.close(SECONDS)

    def wait_joined(self, ids: Sequence[str]) -> None:
        deadline = time.monotonic() + SECONDS
        held = FeedbackState.FEEDBACK_STATE_HELD
        while any(r.state == held for r in self.call("GetFeedback", GetFeedbackRequest(feedback_ids=ids)).records):  # type: ignore[attr-defined]  # as above
            assert time.monotonic() < deadline

    def comparisons(self, count: int) -> list[ComparisonEvent]:
        """What is on the topic, once there are so many."""
        deadline, consumer = time.monotonic() + SECONDS, self.log.consumer([topics.COMPARISONS], group="test")
        records: list[Record] = []
        while len(records) < count:
            assert time.monotonic() < deadline, f"{len(records)} only"
            records += consumer.poll(0.2)
        consumer.close()
        return parts.comparisons(records)

    def run(self, *arguments: str) -> dict[str, object]:
        """A command on this home; what it printed."""
        command = [sys.executable, "-m", "thumbwheel.cli", *arguments, "--home", str(self.home), "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        printed: dict[str, object] = json.loads(done.stdout)
        return printed


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    stack.close()


def plant(stack: Stack) -> tuple[list[GenerationEvent], str]:
    """A user's content of every kind, and another's. Returns the user's generations, and the other's vote."""
    user = SECRETS[0]
    mine = asked_by(stack.deployment, user, "mine-51c9")
    second = asked_by(stack.deployment, user, "mine-51c9-too", mine.generation.prompt_id)
    prompt_id = parts.new_id()
    theirs = [asked_by(stack.deployment, "bob", f"bobs-{i}", prompt_id) for i in range(2)]
    stack.publish(mine, second, *theirs)
    joined = [
        stack.submit(parts.comparison(mine, second, user=user)),
        stack.submit(parts.edit(theirs[0], "edit-77aa", user=user)),
        stack.submit(parts.comment(theirs[1], "comment-03bb", user=user)),
        stack.submit(parts.comparison(theirs[0], theirs[1], user="bob")),
    ]
    stack.submit(parts.edit(stack.deployment.generation("not yet"), "held-61f0", user=user))
    stack.wait_joined(joined)
    return [mine, second], joined[-1]


def test_no_file_holds_anything_of_a_forgotten_user(stack: Stack) -> None:
    mine, kept = plant(stack)
    stack.comparisons(3)
    exported = stack.run("export", str(stack.home / "out.jsonl"), "--format", "trl")
    assert exported["exported"] == 3
    assert {secret for _, secret in found_in(stack.home, SECRETS)} == set(SECRETS), "planted"
    response = stack.forget(SECRETS[0])
    assert found_in(stack.home, SECRETS) == set()
    assert (response.feedback_erased, response.generations_erased, response.exported_rows_erased) == (4, 2, 2)
    assert {secret for _, secret in found_in(stack.home, ["response-bobs-0"])} == {"response-bobs-0"}
    events = stack.comparisons(5)
    retracted = {e.comparison_id for e in events if e.state == ComparisonState.COMPARISON_STATE_RETRACTED}
    accepted = {e.comparison_id: e for e in events if e.state == ComparisonState.COMPARISON_STATE_ACCEPTED}
    assert [e.feedback_ids for e in (accepted[id] for id in accepted.keys() - retracted)] == [[kept]]
    # The stream brings it again, and the broker loses everything: it does not come back.
    stack.publish(*mine)
    after = asked_by(stack.deployment, "bob", "after")
    stack.publish(after)
    stack.wait_joined([stack.submit(parts.comment(after, "seen", user="bob"))])
    stack.broker.kill()
    stack.broker.start()
    again = stack.comparisons(3)
    assert {e.chosen.text for e in again} - {""} == {accepted[id].chosen.text for id in accepted.keys() - retracted}
    assert found_in(stack.home, SECRETS) == set()
    assert stack.forget(SECRETS[0]) == response
    assert stack.collector.stop() == 0
    assert found_in(stack.home, SECRETS) == set()


def test_killed_while_it_forgets(stack: Stack) -> None:
    """A reader keeps the log from being emptied: the erasure is committed, and cannot finish before the kill."""
    import sqlite3

    plant(stack)
    reader = sqlite3.connect(stack.home / "collector.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM generations").fetchall()
    with pytest.raises(grpc.RpcError) as raised:
        stack.call("Forget", ForgetRequest(user_id=SECRETS[0]), timeout=3.0)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    stack.collector.popen.send_signal(signal.SIGKILL)
    stack.collector.popen.wait(10)
    assert found_in(stack.home, SECRETS), "committed, and still on the disk"
    reader.execute("COMMIT")
    reader.close()
    stack.collector.start().wait_serving()
    response = stack.forget(SECRETS[0])
    assert (response.feedback_erased, response.generations_erased) == (4, 2)
    assert found_in(stack.home, SECRETS) == set()
    assert stack.collector.stop() == 0


def test_what_is_imported_beside_a_running_collector_reaches_the_stream(stack: Stack) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(30)]
    path = stack.home / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "nothing\n")
    done = stack.run("import", str(path))
    assert (done["imported"], done["duplicates"], done["refused"]) == (30, 0, 1)
    [refused] = Path(str(done["report"])).read_text().splitlines()
    assert json.loads(refused)["line"] == 31
    assert {event.chosen.text for event in stack.comparisons(30)} == {f"Yes {i}." for i in range(30)}
    assert stack.run("import", str(path))["duplicates"] == 30
    exported = stack.run("export", str(stack.home / "out.jsonl"), "--format", "trl")
    assert exported["exported"] == 30
    written = [json.loads(line) for line in (stack.home / "out.jsonl").read_text().splitlines()]
    assert sorted(written, key=str) == sorted(rows, key=str)
    at = dataclasses.replace(StackSettings(home=stack.home).addresses, control=stack.control)
    (stack.home / STATE_FILE).write_text(json.dumps(dataclasses.asdict(at)))
    forgotten = stack.run("forget", "import:set")
    # Counts are 64 bits wide, which JSON has as text.
    assert [forgotten[name] for name in ("feedback_erased", "generations_erased", "exported_rows_erased")] == [
        "30",
        "60",
        "30",
    ]
    assert (stack.home / "out.jsonl").read_text() == ""
    assert stack.collector.stop() == 0
