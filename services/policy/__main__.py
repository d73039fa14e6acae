"""`python -m services.policy`: the policy service."""

from __future__ import annotations

from services.policy.config import PolicySettings
from thumbwheel import serving, telemetry


async def main(settings: PolicySettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.policy.recording import Recorder
    from services.policy.service import Limits, PolicyService
    from services.process import running
    from thumbwheel.auth import ReceiptKey
    from thumbwheel.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    key = ReceiptKey.load(settings.keys_path)
    async with running(settings, ModelRole.MODEL_ROLE_POLICY, process="policy") as model:
        recorder = Recorder(model.log, capacity=settings.recorder_capacity)
        limits = Limits(settings.max_model_len, settings.max_tokens, settings.max_in_flight)
        service = PolicyService(engine=model.engine, encoder=model.encoder, recorder=recorder, key=key, limits=limits)
        await model.serve(
            "thumbwheel.v1.PolicyService",
            add_PolicyServiceServicer_to_server,
            service,
            background={"recorder": recorder.run},
            drained=lambda: recorder.flush(timeout=10.0),
        )


if __name__ == "__main__":
    parsed = PolicySettings.from_command_line(prog="python -m services.policy")
    telemetry.setup_logging("policy", parsed.log_level)
    serving.run("policy", main(parsed))
