"""What policy and reward do alike: start the engine on the newest version that verifies, serve, follow newer ones.

store ──▶ newest that verifies ──▶ engine ──▶ (the service) ──▶ serve, follow the versions topic, watch the engine
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from services.config import EngineSettings
from services.engine import Engine
from services.prompts import PromptEncoder
from services.versions import Follower, newest_verified
from thumbwheel import serving
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.serving import Background
from thumbwheel.stream import open_log
from thumbwheel.stream.log import Log
from thumbwheel.v1.rollout_pb2 import ModelRole


@dataclass(frozen=True)
class Model:
    """A model that is ready to serve, and what belongs to it."""

    process: str
    settings: EngineSettings
    engine: Engine
    encoder: PromptEncoder
    log: Log
    follower: Follower

    async def serve(
        self,
        service: str,
        add: Callable[[Any, Any], None],
        servicer: object,
        *,
        background: dict[str, Background] | None = None,
        drained: Background | None = None,
    ) -> None:
        """Serves `service`, a full gRPC name that `add` registers, until SIGTERM. See `serving.serve`."""
        await serving.serve(
            process=self.process,
            listen=self.settings.listen,
            metrics_port=self.settings.metrics_port,
            services=[service],
            register=partial(add, servicer),
            background={"follower": self.follower.run, "engine": self.engine.watch, **(background or {})},
            drained=drained,
            drain_seconds=self.settings.drain_seconds,
        )


@contextlib.asynccontextmanager
async def running(settings: EngineSettings, role: ModelRole.ValueType, *, process: str) -> AsyncIterator[Model]:
    """The model of a role, started and, at the end, ended.

    Raises `errors.MissingModel` where the store has none, and `errors.FailedPrecondition` where vLLM cannot serve it.
    """
    store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
    version = newest_verified(store, role, process=process)
    engine = await Engine.start(version, settings, pooling=role == ModelRole.MODEL_ROLE_REWARD)
    log = open_log(settings.bootstrap_servers)
    try:
        encoder = await asyncio.to_thread(PromptEncoder, version.path)
        follower = Follower(log=log, store=store, engine=engine, role=role, process=process)
        yield Model(process, settings, engine, encoder, log, follower)
    finally:
        await engine.close()
        log.close()
