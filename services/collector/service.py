"""The collector's gRPC service, and what runs behind it.

SubmitFeedback ──▶ check ──▶ Database.write ──▶ commit ──▶ OK ──▶ wake the relay
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import grpc
import grpc.aio

from services.collector import ledger, metrics, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.ingest import Ingest
from services.collector.ledger import Recorded
from services.collector.relay import Relay
from services.collector.rights.eraser import Eraser
from services.collector.rights.redaction import Redaction
from services.collector.rights.tenants import Tenants
from services.collector.submission import Checker, check_id
from thumbwheel import errors, serving
from thumbwheel.auth import ReceiptKey
from thumbwheel.stream import open_log
from thumbwheel.v1 import preference_pb2_grpc
from thumbwheel.v1.preference_pb2 import (
    ForgetRequest,
    ForgetResponse,
    GetFeedbackRequest,
    GetFeedbackResponse,
    NextComparisonRequest,
    NextComparisonResponse,
    RetractRequest,
    RetractResponse,
    SubmitFeedbackRequest,
    SubmitFeedbackResponse,
)

NAME = "thumbwheel.v1.PreferenceService"
MAX_FEEDBACK_IDS = 1_000

Context = grpc.aio.ServicerContext[Any, Any]


class Preferences(preference_pb2_grpc.PreferenceServiceServicer):
    """Implements `PreferenceService` on a database. `committed` is called after each commit that is to be published."""

    def __init__(self, database: Database, checker: Checker, committed: Callable[[], None], eraser: Eraser) -> None:
        self._database = database
        self._checker = checker
        self._committed = committed
        self._eraser = eraser

    async def SubmitFeedback(self, request: SubmitFeedbackRequest, context: Context) -> SubmitFeedbackResponse:
        """Returns when the feedback is durable."""
        with _counted():
            submission = self._checker.check(request.feedback, tenant=_tenant(context))
            recorded = await self._database.write(
                partial(ledger.submit, submission=submission, traceparent=_traceparent(context))
            )
        if recorded.changed:
            self._changed(recorded)
        else:
            metrics.DUPLICATES.inc()
        record = recorded.record
        return SubmitFeedbackResponse(
            feedback_id=record.feedback_id, duplicate=not recorded.changed, received_at=record.received_at
        )

    async def Retract(self, request: RetractRequest, context: Context) -> RetractResponse:
        """Returns when the retraction is durable."""
        with _counted():
            check_id(request.feedback_id, "feedback_id")
            check_id(request.user_id, "user_id")
            recorded = await self._database.write(
                partial(
                    ledger.retract,
                    feedback_id=request.feedback_id,
                    user_id=request.user_id,
                    tenant=_tenant(context),
                    traceparent=_traceparent(context),
                )
            )
        if recorded.changed:
            self._changed(recorded)
        return RetractResponse(record=recorded.record)

    async def GetFeedback(self, request: GetFeedbackRequest, context: Context) -> GetFeedbackResponse:
        """Reads what is committed."""
        with _counted():
            if len(request.feedback_ids) > MAX_FEEDBACK_IDS:
                raise errors.InvalidArgument(
                    f"holds {len(request.feedback_ids)} ids.",
                    field="feedback_ids",
                    remedy=f"Ask for {MAX_FEEDBACK_IDS} at a time.",
                )
            records = await self._database.read(
                partial(ledger.find, feedback_ids=list(request.feedback_ids), tenant=_tenant(context))
            )
        return GetFeedbackResponse(records=records)

    async def NextComparison(self, request: NextComparisonRequest, context: Context) -> NextComparisonResponse:
        """Not there yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "NextComparison is not implemented in this version.")

    async def Forget(self, request: ForgetRequest, context: Context) -> ForgetResponse:
        """Returns when nothing of the user is left in any file of the collector."""
        with _counted():
            check_id(request.user_id, "user_id")
            return await self._eraser.forget(_tenant(context), request.user_id)

    def _changed(self, recorded: Recorded) -> None:
        metrics.FEEDBACK.labels(recorded.kind, recorded.state).inc()
        self._committed()


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    try:
        yield
    except errors.ThumbwheelError as error:
        metrics.REFUSED.labels(type(error).__name__).inc()
        raise


def _tenant(context: Context) -> str:
    tenant = serving.tenant(context)
    check_id(tenant, serving.TENANT_KEY)
    return tenant


def _traceparent(context: Context) -> str:
    """The caller's trace, to be handed on with what is published. Anything too long to be one is left out."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str) and len(value) <= 128:
            return value
    return ""


@contextlib.asynccontextmanager
async def opened(settings: CollectorSettings) -> AsyncIterator[Database]:
    """The database, open and its levels served as metrics. Opening migrates, and so may take a while."""
    database = await asyncio.to_thread(
        Database,
        settings.database_url,
        max_pending=settings.max_pending_writes,
        timeout=settings.write_timeout_seconds,
    )
    try:
        with metrics.LevelCollector(partial(database.read_now, outbox.levels)):
            yield database
    finally:
        await asyncio.to_thread(database.close)


async def collect(settings: CollectorSettings) -> None:
    """Runs the collector until SIGTERM. Feedback is taken while the broker is away, and published when it is back."""
    tenants = Tenants.load(settings.tenants_path)
    checker = Checker(ReceiptKey.load(settings.keys_path), settings.max_text_bytes, tenants)
    redaction = Redaction(tenants)
    log = open_log(settings.bootstrap_servers)
    try:
        async with opened(settings) as database:
            relay = Relay(database, log, settings, redaction)
            ingest = Ingest(database, log, settings, relay.wake, tenants)
            eraser = Eraser(database, settings, tenants, relay.wake)
            preferences = Preferences(database, checker, relay.wake, eraser)
            await serving.serve(
                process="collector",
                listen=settings.listen,
                metrics_port=settings.metrics_port,
                services=[NAME],
                register=partial(preference_pb2_grpc.add_PreferenceServiceServicer_to_server, preferences),
                background={"relay": relay.run, "ingest": ingest.run, "eraser": eraser.run},
                drain_seconds=settings.drain_seconds,
            )
    finally:
        log.close()
