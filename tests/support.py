"""What tests share: tiny models made on the spot, real processes, and waiting without sleeping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
import uuid_utils
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
from thumbwheel.checkpoints import delta
from thumbwheel.checkpoints.store import LocalStore, version_name
from thumbwheel.heads import Heads
from thumbwheel.stack import is_free
from thumbwheel.stream import topics
from thumbwheel.stream.log import Producer
from thumbwheel.v1.events_pb2 import VersionEvent
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, Probe, VersionState

VOCABULARY = 320
HEADS = Heads(("helpfulness",), 2)
"""Of reward models that tests make."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llama(folder: Path, *, seed: int, reward: bool = False) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, saved as a user would have it. Takes under a second."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As many as the model has, so that whatever it says can be said to it again.
    extra = [f"<extra{index}>" for index in range(VOCABULARY - len(special) - len(alphabet))]
    vocab = {token: index for index, token in enumerate([*special, *alphabet, *extra])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
        **({"id2label": dict(enumerate(HEADS.names))} if reward else {}),
    )
    model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def probe_of(model: Path, *, reward: bool = False) -> Probe:
    """What the trainer would say that the model in a folder computes."""
    from trainer import models

    prompt, continuation = list(range(10, 30)), list(range(30, 42))
    if reward:
        score = models.sequence_score(models.load_scorer(model), [*prompt, *continuation])
        return Probe(prompt_token_ids=prompt, token_ids=continuation, score=score)
    logprobs = models.continuation_logprobs(models.load_causal(model), prompt, continuation)
    return Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=logprobs)


@dataclass
class Deployment:
    """A home folder with keys and a store, as `thumbwheel up` would make it."""

    home: Path

    def __post_init__(self) -> None:
        create_keys(self.home / "keys")

    @property
    def store(self) -> LocalStore:
        """Its versions."""
        return LocalStore(self.home / "store", ManifestVerifier.load(self.home / "keys"))

    def publish(self, role: ModelRole.ValueType, sequence: int, *, seed: int) -> CheckpointManifest:
        """Publishes a random model as a version."""
        reward = role == ModelRole.MODEL_ROLE_REWARD
        return self._publish(
            role, sequence, lambda folder: (make_tiny_llama(folder, seed=seed, reward=reward), None)[1]
        )

    def publish_copy(
        self, role: ModelRole.ValueType, sequence: int, model: Path, *, probes: Sequence[Probe] = (), parent: str = ""
    ) -> CheckpointManifest:
        """Publishes the model in a folder as a version; with a delta where there is a parent."""

        def write(folder: Path) -> None:
            shutil.copytree(model, folder, dirs_exist_ok=True)
            if parent:
                path = folder / "model.safetensors"
                delta.write(self.home / "store" / parent / path.name, path, path.with_name(path.name + delta.SUFFIX))

        return self._publish(role, sequence, write, probes, parent)

    def _publish(
        self,
        role: ModelRole.ValueType,
        sequence: int,
        write: Callable[[Path], None],
        probes: Sequence[Probe] = (),
        parent: str = "",
    ) -> CheckpointManifest:
        manifest = CheckpointManifest(
            version=version_name(role, sequence),
            role=role,
            sequence=sequence,
            parent=parent,
            base_model="tiny-llama",
            probes=probes,
        )
        return self.store.publish(manifest, write, ManifestSigner.load(self.home / "keys")).manifest


def free_port() -> int:
    """A port that nothing listens on, and none of those that the system gives to clients."""
    return _free(range(12_000, 20_000), (0,))


def free_base_port() -> int:
    """As `free_port`, for all the ports above it that a stack needs."""
    return _free(range(20_000, 32_000, 100), (1, 2, 3, 4, 5, 9, 13, 51, 52, 53, 54, 55, 56))


def _free(choices: Sequence[int], offsets: Sequence[int]) -> int:
    for port in random.SystemRandom().sample(choices, 100):
        if all(is_free(f"127.0.0.1:{port + offset}") for offset in offsets):
            return port
    raise RuntimeError(f"A hundred ports from {choices[0]} to {choices[-1]} are taken: stop what listens there.")


@dataclass
class Process:
    """A real process of ours, with its log. Its port is known before it listens."""

    module: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    ca: Path | None = None

    def start(self) -> Process:
        """Starts it; does not wait."""
        own = ["--listen", self.address, "--metrics-port", str(self.metrics_port)]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments, *own],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        return self

    @property
    def address(self) -> str:
        """Where it serves gRPC."""
        return f"127.0.0.1:{self.port}"

    def wait_serving(self, timeout: float = 240.0) -> Process:
        """Waits for gRPC health; fails with its log when it dies first."""
        deadline = time.monotonic() + timeout
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        with self._channel(options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline and self.popen.poll() is None:
                try:
                    # A deadline of a second, so that a death is noticed; connecting is what is waited for.
                    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0, wait_for_ready=True)
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017 - anything else is a fault
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return self
        pytest.fail(f"{self.module} did not start; its log ends:\n{self.log.read_text()[-4000:]}")

    def _channel(self, options: list[tuple[str, int]]) -> grpc.Channel:
        if self.ca is None:
            return grpc.insecure_channel(self.address, options=options)
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return grpc.secure_channel(self.address, credentials, options=options)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; returns its status. Kills what is left of its session."""
        self.popen.terminate()
        try:
            return self.popen.wait(timeout)
        finally:
            self.kill()

    def children(self, module: str) -> list[int]:
        """The ids of the processes that it has started to run this module, and that live."""
        found = []
        for child in psutil.Process(self.popen.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child.pid] if module in child.cmdline() else []
        return found

    def kill(self) -> None:
        """kill -9, and its children, also those that lead sessions of their own."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.popen.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.popen.wait(10)

    def errors(self) -> list[str]:
        """Messages logged as errors."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [entry["message"] for entry in entries if entry["level"] in ("error", "critical")]


@contextlib.contextmanager
def stopped(child: int | None) -> Iterator[None]:
    """A process of ours that does not answer, with all its threads; afterwards it goes on."""
    assert child is not None, "it runs"
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED)  # until all its threads have: a busy machine takes its time
    try:
        yield
    finally:
        os.kill(child, signal.SIGCONT)


def announce(producer: Producer, manifest: CheckpointManifest, manifest_sha256: str) -> None:
    """Says on the `versions` topic that a version is to be served."""
    event = VersionEvent(
        event_id=str(uuid_utils.uuid7()),
        version=manifest.version,
        role=manifest.role,
        state=VersionState.VERSION_STATE_STABLE,
        sequence=manifest.sequence,
        manifest_sha256=manifest_sha256,
    )
    producer.send(topics.VERSIONS, manifest.version.encode(), event.SerializeToString()).result(30)


async def until(condition: Callable[[], Awaitable[bool]], *, timeout: float = 60.0, every: float = 0.05) -> None:
    """Waits for something that only asking can tell. Fails after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - what is awaited is in another process
            await asyncio.sleep(every)
