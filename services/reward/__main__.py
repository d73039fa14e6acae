"""`python -m services.reward`: the reward service."""

from __future__ import annotations

from services.reward.config import RewardSettings
from thumbwheel import serving, telemetry


async def main(settings: RewardSettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.admission import Admission
    from services.process import running
    from services.reward.service import RewardService
    from thumbwheel.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    async with running(settings, ModelRole.MODEL_ROLE_REWARD, process="reward") as model:
        service = RewardService(
            engine=model.engine,
            encoder=model.encoder,
            max_model_len=settings.max_model_len,
            admission=Admission.of(settings),
        )
        await model.serve(
            "thumbwheel.v1.RewardService", lambda server: add_RewardServiceServicer_to_server(service, server)
        )


if __name__ == "__main__":
    parsed = RewardSettings.from_command_line(prog="python -m services.reward")
    telemetry.start("reward", parsed)
    serving.run("reward", main(parsed))
