"""Who may call: API keys and their scopes, TLS and mutual TLS, and what is refused unguarded."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.certificates import Authority
from tests.servers import Running, Service
from tests.support import until
from thumbwheel import access, apikeys, errors, serving
from thumbwheel.access import Security
from thumbwheel.apikeys import KeyRing
from thumbwheel.calls import MAX_MESSAGE_BYTES
from thumbwheel.client import AsyncClient
from thumbwheel.config import ServerSettings, is_loopback
from thumbwheel.quotas import Quotas
from thumbwheel.tls import ClientTls, ServerTls
from thumbwheel.v1 import policy_pb2 as pb


async def _done() -> pb.GenerateResponse:
    return pb.GenerateResponse(generation=pb.Generation(text="done"))


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    key, text = apikeys.create(tmp_path, scopes=["score", "generate"], tenant="acme")
    file = tmp_path / apikeys.FILE
    assert text.startswith(f"tw_{key.id}_")
    secret = text.split("_", 2)[2]
    assert len(secret) >= 43  # 256 bits
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key.scopes == ("generate", "score")
    assert KeyRing(tmp_path).check(text, "score").tenant == "acme"


def test_a_scope_that_a_key_does_not_have_is_named(tmp_path: Path) -> None:
    _, text = apikeys.create(tmp_path, scopes=["generate"])
    _, admin = apikeys.create(tmp_path, scopes=["admin"])
    ring = KeyRing(tmp_path)
    with pytest.raises(errors.PermissionDenied, match=r"scope 'feedback', only generate\. .*--scope feedback"):
        ring.check(text, "feedback")
    assert ring.check(admin, "feedback").scopes == ("admin",)


@pytest.mark.parametrize("text", ["", "tw_", "tw__", "tw_abc_def", "sk_live_1", "tw_{id}_", "tw_{id}_wrong", "{id}"])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    key, _ = apikeys.create(tmp_path, scopes=["generate"])
    with pytest.raises(errors.Unauthenticated, match="not one of this deployment"):
        KeyRing(tmp_path).check(text.format(id=key.id), "generate")


def test_expired_and_revoked_keys_are_refused(tmp_path: Path) -> None:
    _, short = apikeys.create(tmp_path, scopes=["generate"], days=1e-9)
    revoked, gone = apikeys.create(tmp_path, scopes=["generate"])
    assert apikeys.revoke(tmp_path, revoked.id).revoked_at
    ring = KeyRing(tmp_path)
    with pytest.raises(errors.Unauthenticated, match="is expired"):
        ring.check(short, "generate")
    with pytest.raises(errors.Unauthenticated, match="is revoked"):
        ring.check(gone, "generate")
    with pytest.raises(errors.NotFound, match="no key 'nobody'"):
        apikeys.revoke(tmp_path, "nobody")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"scopes": ["generate", "everything"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["score"], "tenant": ""}, "tenant"),
        ({"scopes": ["score"], "tenant": "x" * 129}, "tenant"),
        ({"scopes": ["score"], "tenant": "a\nb"}, "tenant"),
        ({"scopes": ["score"], "days": 0}, "days"),
    ],
)
def test_a_bad_key_is_not_made(tmp_path: Path, given: dict[str, object], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        apikeys.create(tmp_path, **given)  # type: ignore[arg-type]  # by name
    assert caught.value.field == field
    assert not (tmp_path / apikeys.FILE).exists()


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: apikeys.create(tmp_path, scopes=["score"])[0].id, range(16)))
    assert sorted(key.id for key in apikeys.listed(tmp_path)) == sorted(made)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"keys": [{}]}', '{"keys": [{"id": "a", "sha256": "zz", "tenant": "t", "scopes": []}]}']
)
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / apikeys.FILE).write_text(content)
    with pytest.raises(errors.FailedPrecondition, match=r"api-keys\.json is not a file of API keys"):
        KeyRing(tmp_path)


def test_a_ring_reloads_what_changed_and_keeps_what_it_knew_of_a_broken_file(tmp_path: Path) -> None:
    key, text = apikeys.create(tmp_path, scopes=["generate"])
    ring = KeyRing(tmp_path)
    assert not ring.reload()
    whole = (tmp_path / apikeys.FILE).read_text()
    (tmp_path / apikeys.FILE).write_text(whole[:-9])
    assert not ring.reload()
    assert ring.check(text, "generate") == key
    (tmp_path / apikeys.FILE).unlink()
    assert not ring.reload()
    assert ring.check(text, "generate") == key
    (tmp_path / apikeys.FILE).write_text(whole)
    apikeys.revoke(tmp_path, key.id)
    assert ring.reload()
    with pytest.raises(errors.Unauthenticated):
        ring.check(text, "generate")


def test_keys_that_are_required_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="thumbwheel keys create"):
        Security.load(ServerSettings(home=tmp_path, require_api_keys=True))


async def test_calls_need_a_key_of_their_scope_and_are_its_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_WATCH_SECONDS", 0.02)
    _, text = apikeys.create(tmp_path, scopes=["generate"], tenant="acme")
    _, scoring = apikeys.create(tmp_path, scopes=["score"])
    _, admin = apikeys.create(tmp_path, scopes=["admin"])
    service = Service(_done)
    running = Running(service, security=Security(keys=KeyRing(tmp_path)))

    async def call(key: str, tenant: str = "") -> str:
        async with AsyncClient(policy=running.address, api_key=key, tenant=tenant, timeout=10) as client:
            return (await client.generate("hi")).text

    assert await call(text) == "done"
    assert await call(text, "acme") == "done"
    assert await call(admin, "other") == "done"
    assert service.tenants == ["acme", "acme", "other"]
    with pytest.raises(errors.Unauthenticated, match="needs an API key"):
        await call("")
    with pytest.raises(errors.Unauthenticated, match="not one of"):
        await call(text[:-1])
    with pytest.raises(errors.PermissionDenied, match="scope 'generate'"):
        await call(scoring)
    with pytest.raises(errors.PermissionDenied, match="of tenant 'acme', not 'other'"):
        await call(text, "other")
    assert len(service.tenants) == 3  # what was refused did not reach the service

    new, newer = apikeys.create(tmp_path, scopes=["generate"], tenant="acme")  # rotation, while it serves

    async def known() -> bool:
        try:
            return await call(newer) == "done"
        except errors.Unauthenticated:
            return False

    await until(known, timeout=10)
    apikeys.revoke(tmp_path, new.id)

    async def refused() -> bool:
        return not await known()

    await until(refused, timeout=10)
    assert await call(text) == "done"
    await running.stop()


async def test_health_and_reflection_need_no_key(tmp_path: Path) -> None:
    apikeys.create(tmp_path, scopes=["generate"])
    running = Running(Service(_done), security=Security(keys=KeyRing(tmp_path)))

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with grpc.aio.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask(), timeout=10)
        names = [service.name async for part in listing for service in part.list_services_response.service]
    await running.stop()
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert "thumbwheel.v1.PolicyService" in names


def test_addresses_of_this_machine_are_known() -> None:
    inside, outside = ["127.0.0.1", "127.8.0.1", "localhost", "[::1]"], ["0.0.0.0", "[::]", "10.0.0.1", "policy.svc"]
    assert [is_loopback(host) for host in (*inside, *outside)] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.1.2.3", "policy.example"])
def test_other_machines_are_not_served_unguarded(tmp_path: Path, host: str) -> None:
    pair = Authority(tmp_path, "ca").issue("server")
    apikeys.create(tmp_path, scopes=["admin"])
    keys, tls = KeyRing(tmp_path), ServerTls(pair.certificate, pair.key)
    mutual = ServerTls(pair.certificate, pair.key, tmp_path / "ca.pem")
    address = f"{host}:50051"
    with pytest.raises(errors.FailedPrecondition, match=r"no TLS .*, and no API keys .* --allow-insecure"):
        Security().check_address(address)
    with pytest.raises(errors.FailedPrecondition, match=r"there is no TLS \("):
        Security(keys=keys).check_address(address)
    with pytest.raises(errors.FailedPrecondition, match=r"there is no API keys .* or client certificates"):
        Security(tls=tls).check_address(address)
    Security(keys=keys, tls=tls).check_address(address)
    Security(tls=mutual).check_address(address)
    Security(allow_insecure=True).check_address(address)
    Security().check_address("127.0.0.1:50051")


async def test_a_server_refuses_to_bind_unguarded() -> None:
    with pytest.raises(errors.FailedPrecondition, match=r"0\.0\.0\.0:0 can be reached from other machines"):
        await serving.serve(
            process="x", listen="0.0.0.0:0", metrics_port=0, services=[], register=lambda _: None, background={}
        )


def test_a_key_does_not_leave_this_machine_unencrypted() -> None:
    with pytest.raises(errors.FailedPrecondition, match=r"policy\.example:50051 unencrypted"):
        AsyncClient(policy="policy.example:50051", api_key="tw_a_b")


async def test_tls_and_a_renewed_certificate(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "stranger")
    pair = authority.issue("server")
    running = Running(Service(_done), security=Security(tls=ServerTls(pair.certificate, pair.key)))

    async def call(tls: ClientTls | None) -> str:
        async with AsyncClient(policy=running.address, tls=tls, timeout=3, connections=2) as client:
            return (await client.generate("hi")).text

    assert await call(ClientTls(authority.certificate)) == "done"
    for tls in (None, ClientTls(stranger.certificate)):
        with pytest.raises(errors.Unavailable):
            await call(tls)
    (tmp_path / "server.key").write_bytes(b"half a file")  # as it is while it is being renewed
    assert await call(ClientTls(authority.certificate)) == "done"
    stranger.issue("server")
    assert await call(ClientTls(stranger.certificate)) == "done"
    with pytest.raises(errors.Unavailable):
        await call(ClientTls(authority.certificate))
    await running.stop()


async def test_mutual_tls(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "stranger")
    pair, known, unknown = authority.issue("server"), authority.issue("app"), stranger.issue("intruder")
    tls = ServerTls(pair.certificate, pair.key, authority.certificate)
    running = Running(Service(_done), security=Security(tls=tls))

    async def call(certificate: Path | None, key: Path | None) -> str:
        shown = ClientTls(authority.certificate, certificate, key)
        async with AsyncClient(policy=running.address, tls=shown, timeout=3) as client:
            return (await client.generate("hi")).text

    assert await call(known.certificate, known.key) == "done"
    with pytest.raises(errors.Unavailable):
        await call(None, None)
    with pytest.raises(errors.Unavailable):
        await call(unknown.certificate, unknown.key)
    await running.stop()


def test_bad_certificates_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    good, other, old = authority.issue("good"), authority.issue("other"), authority.issue("old", days=-1)
    (tmp_path / "bad.pem").write_text("not PEM")
    bad, missing = tmp_path / "bad.pem", tmp_path / "missing.pem"
    cases: list[tuple[ServerTls | ClientTls, str]] = [
        (ServerTls(missing, good.key), r"missing\.pem cannot be read \(No such file"),
        (ServerTls(bad, good.key), r"bad\.pem has no PEM certificate"),
        (ServerTls(good.certificate, bad), r"bad\.pem is not an unencrypted PEM private key"),
        (ServerTls(good.certificate, other.key), r"other\.key is not the key of .*good\.crt"),
        (ServerTls(old.certificate, old.key), r"old\.crt expired on"),
        (ServerTls(good.certificate, good.key, bad), r"bad\.pem has no PEM certificate"),
        (ClientTls(bad), r"bad\.pem has no PEM certificate"),
        (ClientTls(None, good.certificate), "belong together"),
    ]
    for tls, said in cases:
        with pytest.raises(errors.FailedPrecondition, match=said):
            tls.credentials()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tls_certificate": "a.crt"}, "--tls-certificate and --tls-key go together"),
        ({"tls_key": "a.key"}, "--tls-certificate and --tls-key go together"),
        ({"tls_client_ca": "ca.pem"}, "--tls-client-ca needs a certificate"),
    ],
)
def test_half_of_tls_is_refused(tmp_path: Path, given: dict[str, str], said: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match=said):
        Security.load(ServerSettings(home=tmp_path, **given))  # type: ignore[arg-type]  # by name


def test_the_environment_names_a_clients_certificates() -> None:
    assert ClientTls.from_environment({}) is None
    given = {"THUMBWHEEL_CLIENT_CA": "a", "THUMBWHEEL_CLIENT_CERTIFICATE": "b", "THUMBWHEEL_CLIENT_KEY": "c"}
    assert ClientTls.from_environment(given) == ClientTls(Path("a"), Path("b"), Path("c"))


async def test_a_message_over_the_cap_is_refused() -> None:
    running = Running(Service(_done))
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(running.address, options=options) as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/thumbwheel.v1.PolicyService/Generate"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"\0" * (MAX_MESSAGE_BYTES + 1), timeout=30, wait_for_ready=True)
    await running.stop()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not isinstance(errors.from_rpc_error(caught.value), errors.Unavailable)


async def test_quotas_are_each_tenants_own() -> None:
    running = Running(Service(_done), security=Security(quotas=Quotas(rate=0.5)))
    async with (
        AsyncClient(policy=running.address, tenant="a", timeout=1.0) as a,
        AsyncClient(policy=running.address, tenant="b", timeout=1.0) as b,
    ):
        await a.generate("hi")
        with pytest.raises(errors.ResourceExhausted, match=r"Tenant 'a' calls more than 0\.5 times a second") as caught:
            await a.generate("hi")
        await b.generate("hi")
    await running.stop()
    assert 1.0 < caught.value.retry_after <= 2.0


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from thumbwheel.cli import app

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["keys", *arguments, "--home", str(tmp_path)])
        return result.exit_code, result.output

    code, made = run("create", "--scope", "generate", "--scope", "feedback", "--tenant", "acme", "--json")
    assert code == 0
    key = json.loads(made)
    assert KeyRing(tmp_path / "keys").check(key["key"], "feedback").tenant == "acme"
    assert run("revoke", key["id"]) == (0, f"key {key['id']} of tenant acme is revoked\n")
    (shown,) = json.loads(run("list", "--json")[1])
    assert (shown["id"], shown["state"], shown["scopes"]) == (key["id"], "revoked", ["generate", "feedback"])
    assert "sha256" not in shown
    assert run("create", "--scope", "all")[0] == 1
    assert run("revoke", "nobody")[0] == 1
