"""`python -m services.reward`: the reward service."""

from __future__ import annotations

from services.reward.config import RewardSettings
from thumbwheel import serving, telemetry


async def main(settings: RewardSettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.process import running
    from services.reward.service import RewardService
    from thumbwheel.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    async with running(settings, ModelRole.MODEL_ROLE_REWARD, process="reward") as model:
        service = RewardService(
            engine=model.engine,
            encoder=model.encoder,
            max_model_len=settings.max_model_len,
            max_in_flight=settings.max_in_flight,
        )
        await model.serve("thumbwheel.v1.RewardService", add_RewardServiceServicer_to_server, service)


if __name__ == "__main__":
    parsed = RewardSettings.from_command_line(prog="python -m services.reward")
    telemetry.setup_logging("reward", parsed.log_level)
    serving.run("reward", main(parsed))
