"""`python -m services.policy`: the policy service."""

from __future__ import annotations

import asyncio

from services.policy.config import PolicySettings
from thumbwheel import serving, telemetry


async def main(settings: PolicySettings) -> None:
    """Starts the engine on the newest version that verifies, then serves and follows new ones."""
    from services.admission import Admission
    from services.policy.bulk import Bulk
    from services.policy.generating import Generating, Limits
    from services.policy.recording import Recorder
    from services.policy.service import PolicyService
    from services.policy.spool import Spool
    from services.process import running
    from thumbwheel.auth import ReceiptKey
    from thumbwheel.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server
    from thumbwheel.v1.rollout_pb2 import ModelRole

    key = ReceiptKey.load(settings.keys_path)
    spool = await asyncio.to_thread(Spool, settings.spool_path, limit=settings.spool_bytes)
    async with running(settings, ModelRole.MODEL_ROLE_POLICY, process="policy") as model:
        recorder = Recorder(model.log, spool)
        generating = Generating(
            engine=model.engine,
            encoder=model.encoder,
            recorder=recorder,
            key=key,
            limits=Limits(settings.max_model_len, settings.max_tokens),
        )
        admission = Admission.of(settings, reserved=settings.bulk_slots, kv_tokens=model.engine.kv_tokens)
        bulk = Bulk(generating, slots=settings.bulk_slots, people=lambda: admission.in_flight)
        service = PolicyService(generating, admission, bulk, coalesce=settings.coalesce_seconds)
        try:
            await model.serve(
                "thumbwheel.v1.PolicyService",
                lambda server: add_PolicyServiceServicer_to_server(service, server),
                background={"keeper": recorder.keep, "sender": recorder.send},
                drained=lambda: recorder.flush(timeout=10.0),
                stopping=bulk.stop,
            )
        finally:
            await recorder.close()


if __name__ == "__main__":
    parsed = PolicySettings.from_command_line(prog="python -m services.policy")
    telemetry.start("policy", parsed)
    serving.run("policy", main(parsed))
