"""The control plane is apart from the data plane, and probes need no TLS."""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.certificates import Authority
from tests.servers import Feedback, Running
from tests.support import free_port
from thumbwheel import apikeys, errors
from thumbwheel.access import CONTROL_METHODS, Security
from thumbwheel.apikeys import KeyRing
from thumbwheel.client import AsyncClient
from thumbwheel.tls import ServerTls
from thumbwheel.v1 import policy_pb2_grpc, preference_pb2_grpc, reward_pb2_grpc, rollout_pb2_grpc


async def test_the_control_plane_answers_at_its_own_address_and_nowhere_else() -> None:
    control = f"127.0.0.1:{free_port()}"
    running = Running(Feedback(), control_listen=control)
    async with AsyncClient(collector=running.address, control=control, timeout=10) as client:
        assert (await client.forget("ann")).feedback_erased == 7
        assert await client.feedback(["01890000-0000-7000-8000-000000000000"]) == []
    async with AsyncClient(collector=control, control=running.address, timeout=10) as swapped:
        with pytest.raises(errors.FailedPrecondition, match="Forget is not answered on the data plane"):
            await swapped.forget("ann")
        with pytest.raises(errors.FailedPrecondition, match="GetFeedback is not answered on the control plane"):
            await swapped.feedback(["01890000-0000-7000-8000-000000000000"])
    await running.stop()


async def test_the_control_plane_has_a_scope_of_its_own(tmp_path: Path) -> None:
    _, feedback = apikeys.create(tmp_path, scopes=["feedback"])
    _, controlling = apikeys.create(tmp_path, scopes=["control"])
    control = f"127.0.0.1:{free_port()}"
    running = Running(Feedback(), security=Security(keys=KeyRing(tmp_path)), control_listen=control)

    async def forget(key: str, tenant: str = "") -> int:
        async with AsyncClient(control=control, api_key=key, tenant=tenant, timeout=10) as client:
            return (await client.forget("ann")).feedback_erased

    assert await forget(controlling) == 7
    with pytest.raises(errors.PermissionDenied, match="scope 'control'"):
        await forget(feedback)
    with pytest.raises(errors.PermissionDenied, match="of tenant"):
        await forget(controlling, "other")
    async with AsyncClient(collector=running.address, api_key=controlling, timeout=10) as client:
        with pytest.raises(errors.PermissionDenied, match="scope 'feedback'"):
            await client.feedback(["01890000-0000-7000-8000-000000000000"])
    await running.stop()


def test_every_method_of_the_control_plane_exists() -> None:
    server = _Names()
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(policy_pb2_grpc.PolicyServiceServicer(), server)  # type: ignore[arg-type,abstract]
    reward_pb2_grpc.add_RewardServiceServicer_to_server(reward_pb2_grpc.RewardServiceServicer(), server)  # type: ignore[arg-type,abstract]
    preference_pb2_grpc.add_PreferenceServiceServicer_to_server(preference_pb2_grpc.PreferenceServiceServicer(), server)  # type: ignore[arg-type,abstract]
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(rollout_pb2_grpc.RolloutServiceServicer(), server)  # type: ignore[arg-type,abstract]
    assert set(CONTROL_METHODS) <= server.methods


class _Names:
    """Notes which methods are registered."""

    def __init__(self) -> None:
        self.methods: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: object) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, object]) -> None:
        self.methods |= {f"/{service}/{name}" for name in handlers}


async def test_probes_need_no_certificate_and_reach_nothing_else(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    pair, port = authority.issue("server"), free_port()
    tls = ServerTls(pair.certificate, pair.key, authority.certificate)
    running = Running(Feedback(), security=Security(tls=tls), probe_port=port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with AsyncClient(collector=f"127.0.0.1:{port}", timeout=2) as client:
        with pytest.raises(errors.ThumbwheelError) as refused:
            await client.feedback(["01890000-0000-7000-8000-000000000000"])
    assert refused.value.code == grpc.StatusCode.UNIMPLEMENTED or "UNIMPLEMENTED" in repr(refused.value.__cause__)
    with contextlib.suppress(errors.ThumbwheelError):
        async with AsyncClient(collector=running.address, timeout=2) as client:
            await client.feedback(["01890000-0000-7000-8000-000000000000"])
            pytest.fail("the data plane answered without a certificate")
    await running.stop()
