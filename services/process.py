"""What policy and reward do alike: start the engine on the newest version that verifies, and follow new ones.

store ──▶ newest that verifies ──▶ engine ──▶ (the service) ──▶ serve, follow the versions topic, watch the engine
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from services.config import EngineSettings
from services.engine import Engine
from services.prompts import PromptEncoder
from services.versions import Follower, newest_verified, pinned
from thumbwheel import serving
from thumbwheel.access import Security
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.held import HeldVersions
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.serving import Background, Register
from thumbwheel.stream import open_log
from thumbwheel.stream.log import Log
from thumbwheel.v1.rollout_pb2 import ModelRole


@dataclass(frozen=True)
class Model:
    """A model that is ready to serve, and what belongs to it."""

    process: str
    settings: EngineSettings
    security: Security
    engine: Engine
    encoder: PromptEncoder
    log: Log
    follower: Follower

    async def serve(
        self,
        service: str,
        register: Register,
        *,
        background: dict[str, Background] | None = None,
        drained: Background | None = None,
        stopping: Callable[[], None] | None = None,
    ) -> None:
        """Serves `service`, a full gRPC name, until SIGTERM. See `serving.serve`."""
        settings = self.settings
        news = {} if settings.serve_version else {"follower": self.follower.run}
        await serving.serve(
            process=self.process,
            listen=settings.listen,
            metrics_port=settings.metrics_port,
            services=[service],
            register=register,
            background={**news, "engine": self.engine.watch, **(background or {})},
            drained=drained,
            drain_seconds=settings.drain_seconds,
            security=self.security,
            stopping=stopping,
            probe_port=settings.probe_port,
        )


@contextlib.asynccontextmanager
async def running(settings: EngineSettings, role: ModelRole.ValueType, *, process: str) -> AsyncIterator[Model]:
    """The model of a role, started and, at the end, ended. What is set wrong is said before the engine starts.

    Raises `errors.FailedPrecondition` where the settings, the port, the keys or the store do not allow it.
    """
    security = Security.load(settings)
    security.check_address(settings.listen)
    serving.check_port(process, settings.listen)
    store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
    held = HeldVersions(settings.held_path(process), store)
    fetch_seconds = settings.swap_fetch_seconds
    if settings.serve_version:
        version = await asyncio.to_thread(pinned, held, role, settings.serve_version, timeout=fetch_seconds)
    else:
        version = await asyncio.to_thread(newest_verified, store, held, role, process=process, timeout=fetch_seconds)
    engine = await Engine.start(version, settings, pooling=role == ModelRole.MODEL_ROLE_REWARD)
    log = open_log(settings.bootstrap_servers, settings.kafka_tls)
    try:
        encoder = await asyncio.to_thread(PromptEncoder, version.path)
        follower = Follower(log=log, held=held, engine=engine, role=role, process=process, fetch_seconds=fetch_seconds)
        yield Model(process, settings, security, engine, encoder, log, follower)
    finally:
        await engine.close()
        log.close()
        held.close()
