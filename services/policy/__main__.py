"""`python -m services.policy`: the policy service."""

from __future__ import annotations

import asyncio

from services.policy.config import PolicySettings
from thumbwheel import serving, telemetry


async def main(settings: PolicySettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.engine import Engine
    from services.policy.recording import Recorder
    from services.policy.service import Limits, PolicyService
    from services.policy.spool import Spool
    from services.prompts import PromptEncoder
    from services.versions import Follower, newest_verified
    from thumbwheel.auth import ManifestVerifier, ReceiptKey
    from thumbwheel.checkpoints.store import LocalStore
    from thumbwheel.stream import open_log
    from thumbwheel.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    key = ReceiptKey.load(settings.keys_path)
    store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
    version = newest_verified(store, ModelRole.MODEL_ROLE_POLICY, process="policy")
    engine = await Engine.start(version, settings, pooling=False)
    log = open_log(settings.bootstrap_servers)
    try:
        encoder = await asyncio.to_thread(PromptEncoder, version.path)
        spool = await asyncio.to_thread(Spool, settings.spool_path, limit=settings.spool_bytes)
        recorder = Recorder(log, spool)
        limits = Limits(settings.max_model_len, settings.max_tokens, settings.max_in_flight)
        service = PolicyService(engine=engine, encoder=encoder, recorder=recorder, key=key, limits=limits)
        follower = Follower(log=log, store=store, engine=engine, role=ModelRole.MODEL_ROLE_POLICY, process="policy")
        await serving.serve(
            process="policy",
            listen=settings.listen,
            metrics_port=settings.metrics_port,
            services=["thumbwheel.v1.PolicyService"],
            register=lambda server: add_PolicyServiceServicer_to_server(service, server),
            background={
                "keeper": recorder.keep,
                "sender": recorder.send,
                "follower": follower.run,
                "engine": engine.watch,
            },
            drained=lambda: recorder.flush(timeout=10.0),
            drain_seconds=settings.drain_seconds,
        )
    finally:
        await engine.close()
        log.close()


if __name__ == "__main__":
    parsed = PolicySettings.from_command_line(prog="python -m services.policy")
    telemetry.setup_logging("policy", parsed.log_level)
    serving.run("policy", main(parsed))
