"""The policy service for `bench.serving`: one engine, and every way to it that is measured.

    bare        the engine's own `generate`, in this process: no gRPC, no checks, no receipts, no records
    default     the service as `thumbwheel up` starts it: metrics, receipts, recording
    hardened    the same with TLS and API keys
    plain       gRPC and the service's own code, and nothing else: no keys, TLS, metrics or recording

One engine for all four: two engines differ by more than what is measured, if only by where their memory lies. Reads
commands from standard input, a line of JSON each, and answers each with a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc.aio

from tests.certificates import Authority
from tests.support import free_port
from thumbwheel import apikeys
from thumbwheel.access import Security
from thumbwheel.auth import ManifestSigner, ManifestVerifier, ReceiptKey, create_keys
from thumbwheel.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server

SERVICE = "thumbwheel.v1.PolicyService"


class NoRecorder:
    """Takes events, and forgets them."""

    def record(self, event: Any) -> None:
        """Nothing."""


@dataclass
class Bare:
    """What an application would do that has the engine to itself."""

    llm: Any

    async def run(self, prompts: Sequence[Sequence[int]], tokens: int, *, stream: bool) -> dict[str, float]:
        """All prompts at once, each answered by so many tokens. Seconds and tokens."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        params = vllm.SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, output_kind=kind)

        async def one(number: int, ids: Sequence[int]) -> int:
            count = 0
            prompt = vllm.TokensPrompt(prompt_token_ids=list(ids))
            async for output in self.llm.generate(prompt, params, f"bare-{time.perf_counter()}-{number}"):
                count += len(output.outputs[0].token_ids)
            return count

        start = time.perf_counter()
        counts = await asyncio.gather(*(one(number, ids) for number, ids in enumerate(prompts)))
        return {"seconds": time.perf_counter() - start, "tokens": sum(counts)}


async def main(model: Path, home: Path, bootstrap_servers: str, answers: IO[str]) -> None:
    """Starts everything, says where it is, and does as it is told until standard input ends."""
    from services.admission import Admission
    from services.policy.bulk import Bulk
    from services.policy.config import PolicySettings
    from services.policy.generating import Generating, Limits
    from services.policy.recording import Recorder
    from services.policy.service import PolicyService
    from services.policy.spool import Spool
    from services.process import running
    from thumbwheel import serving
    from thumbwheel.checkpoints.store import LocalStore
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import publish

    create_keys(home / "keys")
    store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))
    publish.ensure_base(model, store, ManifestSigner.load(home / "keys"))
    authority = Authority(home, "ca")
    pair = authority.issue("policy")
    _, key = apikeys.create(home / "keys", scopes=["generate"], tenant="bench")
    settings = PolicySettings(home=home, bootstrap_servers=bootstrap_servers)
    guarded = Security.load(
        settings.model_copy(update={"require_api_keys": True, "tls_certificate": pair.certificate, "tls_key": pair.key})
    )
    spool = Spool(settings.spool_path, limit=settings.spool_bytes)
    receipts, limits = ReceiptKey.load(home / "keys"), Limits(settings.max_model_len, settings.max_tokens)
    async with running(settings, ModelRole.MODEL_ROLE_POLICY, process="policy") as ours:

        def service(recorder: Any) -> PolicyService:
            generating = Generating(
                engine=ours.engine, encoder=ours.encoder, recorder=recorder, key=receipts, limits=limits
            )
            admission = Admission.of(settings, reserved=settings.bulk_slots, kv_tokens=ours.engine.kv_tokens)
            bulk = Bulk(generating, slots=settings.bulk_slots, people=lambda: admission.in_flight)
            return PolicyService(generating, admission, bulk, coalesce=settings.coalesce_seconds)

        recorder = Recorder(ours.log, spool)
        recorded = service(recorder)
        ports = {name: free_port() for name in ("default", "hardened", "plain")}
        tasks = [asyncio.create_task(recorder.keep()), asyncio.create_task(recorder.send())]
        for name, security in (("default", Security()), ("hardened", guarded)):
            server = serving.serve(
                process=name,
                listen=f"127.0.0.1:{ports[name]}",
                metrics_port=0,
                services=[SERVICE],
                register=lambda server: add_PolicyServiceServicer_to_server(recorded, server),
                background={},
                drain_seconds=1.0,
                security=security,
            )
            tasks.append(asyncio.create_task(server))
        plain = grpc.aio.server()
        add_PolicyServiceServicer_to_server(service(NoRecorder()), plain)
        plain.add_insecure_port(f"127.0.0.1:{ports['plain']}")
        await plain.start()
        bare, logger = Bare(ours.engine.llm), ours.engine.llm.logger_manager
        said: dict[str, Any] = {"ports": ports, "ca": str(authority.certificate), "key": key}
        try:
            while True:
                print(json.dumps(said), file=answers, flush=True)
                line = await asyncio.to_thread(sys.stdin.readline)
                if not line:
                    return
                for task in tasks:
                    if task.done():
                        raise RuntimeError("A server of the benchmark ended.") from task.exception()
                command = json.loads(line)
                if command["do"] == "bare":
                    prompts = [ours.encoder.encode(_prompt(text)) for text in command["prompts"]]
                    said = await bare.run(prompts, command["tokens"], stream=command["stream"])
                elif command["do"] == "metrics":
                    # vLLM's own, which are there for whichever way is taken.
                    ours.engine.llm._logger_ref[0] = logger if command["on"] else None
                    said = {}
        finally:
            await plain.stop(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await recorder.close()


def _prompt(text: str) -> Any:
    from thumbwheel.client import to_prompt

    return to_prompt(text)


if __name__ == "__main__":
    from thumbwheel import serving, telemetry

    parser = argparse.ArgumentParser(prog="python -m bench.serving_server")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--bootstrap-servers", required=True)
    given = parser.parse_args()
    telemetry.setup_logging("bench", "warning")
    # What libraries print goes with the logs, and does not come between the answers.
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)
        serving.run("bench", main(given.model, given.home, given.bootstrap_servers, own))
