"""`python -m services.reward`: the reward service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from services.reward.config import RewardSettings
from thumbwheel import serving, telemetry

if TYPE_CHECKING:
    from services.reward.reference import References


async def main(settings: RewardSettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.admission import Admission
    from services.process import running
    from services.reward.reference import Baselines
    from services.reward.service import RewardService
    from thumbwheel.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    async with (
        running(settings, ModelRole.MODEL_ROLE_REWARD, process="reward") as model,
        _references(settings) as references,
    ):
        service = RewardService(
            engine=model.engine,
            encoder=model.encoder,
            max_model_len=settings.max_model_len,
            admission=Admission.of(settings),
            references=references,
            baselines=Baselines(settings.reference_capacity),
        )
        await model.serve(
            "thumbwheel.v1.RewardService", lambda server: add_RewardServiceServicer_to_server(service, server)
        )


@contextlib.asynccontextmanager
async def _references(settings: RewardSettings) -> AsyncIterator[References]:
    """Reference responses, and the client that asks for them, with the key and certificates of the environment."""
    from services.reward.reference import References
    from thumbwheel.channels import key_from_environment
    from thumbwheel.client import AsyncClient
    from thumbwheel.tls import ClientTls
    from thumbwheel.v1.policy_pb2 import Prompt, SamplingParams

    async with contextlib.AsyncExitStack() as stack:
        ask = None
        if settings.reference:
            client = await stack.enter_async_context(
                AsyncClient(
                    policy=settings.reference,
                    api_key=key_from_environment(),
                    tls=ClientTls.from_environment(),
                    consent=False,  # what a user asked is asked again, and that is nothing to be shown or learnt from
                )
            )

            async def ask(prompt: Prompt) -> str:
                sampling = SamplingParams(temperature=1.0, max_tokens=settings.reference_max_tokens, seed=0)
                found = await client.generate(prompt, sampling=sampling, version=settings.reference_version)
                return found.text

        references = References(
            settings.home / "reward" / "references.sqlite",
            ask,
            version=settings.reference_version,
            capacity=settings.reference_capacity,
        )
        stack.callback(references.close)
        yield references


if __name__ == "__main__":
    parsed = RewardSettings.from_command_line(prog="python -m services.reward")
    telemetry.start("reward", parsed)
    serving.run("reward", main(parsed))
