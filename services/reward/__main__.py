"""`python -m services.reward`: the reward service."""

from __future__ import annotations

import asyncio

from services.reward.config import RewardSettings
from thumbwheel import serving, telemetry


async def main(settings: RewardSettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.engine import Engine
    from services.prompts import PromptEncoder
    from services.reward.service import RewardService
    from services.versions import Follower, newest_verified
    from thumbwheel.auth import ManifestVerifier
    from thumbwheel.checkpoints.held import HeldVersions
    from thumbwheel.checkpoints.store import LocalStore
    from thumbwheel.stream import open_log
    from thumbwheel.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
    held = HeldVersions(settings.held_path("reward"), store)
    role, fetch_seconds = ModelRole.MODEL_ROLE_REWARD, settings.swap_fetch_seconds
    version = await asyncio.to_thread(newest_verified, store, held, role, process="reward", timeout=fetch_seconds)
    engine = await Engine.start(version, settings, pooling=True)
    log = open_log(settings.bootstrap_servers)
    try:
        encoder = await asyncio.to_thread(PromptEncoder, version.path)
        service = RewardService(
            engine=engine,
            encoder=encoder,
            max_model_len=settings.max_model_len,
            max_in_flight=settings.max_in_flight,
        )
        follower = Follower(log=log, held=held, engine=engine, role=role, process="reward", fetch_seconds=fetch_seconds)
        await serving.serve(
            process="reward",
            listen=settings.listen,
            metrics_port=settings.metrics_port,
            services=["thumbwheel.v1.RewardService"],
            register=lambda server: add_RewardServiceServicer_to_server(service, server),
            background={"follower": follower.run, "engine": engine.watch},
            drain_seconds=settings.drain_seconds,
        )
    finally:
        await engine.close()
        log.close()
        held.close()


if __name__ == "__main__":
    parsed = RewardSettings.from_command_line(prog="python -m services.reward")
    telemetry.setup_logging("reward", parsed.log_level)
    serving.run("reward", main(parsed))
