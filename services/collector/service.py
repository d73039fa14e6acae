"""The collector's gRPC service, and what runs behind it.

SubmitFeedback ──▶ check ──▶ door: commit to the inbox ──▶ OK
                                      └──▶ clerk: recorded, joined, curated ──▶ wake the relay
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from services.collector import admitting, guide, inbox, ledger, listing, metrics, outbox, taking
from services.collector.acknowledge import Acknowledged, Result
from services.collector.admitting import Offer
from services.collector.asking import Asking
from services.collector.clerk import Clerk, TakingProcess
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.door import AdmittingProcess, Door
from services.collector.ingest import Ingest
from services.collector.intake import Curator
from services.collector.raters import Assessor
from services.collector.relay import Relay
from services.collector.rights.eraser import Eraser
from services.collector.rights.redaction import Redaction
from services.collector.rights.spools import Spools
from services.collector.rights.tenants import Tenants
from services.collector.submission import check_id
from thumbwheel import errors, serving, tracing
from thumbwheel.access import Security
from thumbwheel.channels import Metadata, bearer, check_key, key_from_environment, open_channel
from thumbwheel.stream import open_log
from thumbwheel.tls import ClientTls
from thumbwheel.v1 import preference_pb2_grpc
from thumbwheel.v1.preference_pb2 import (
    Feedback,
    FeedbackRefusal,
    FeedbackResult,
    ForgetRequest,
    ForgetResponse,
    GetFeedbackRequest,
    GetFeedbackResponse,
    GetGuidelinesRequest,
    GetGuidelinesResponse,
    ListFeedbackRequest,
    ListFeedbackResponse,
    NextComparisonRequest,
    NextComparisonResponse,
    RetractRequest,
    RetractResponse,
    StreamFeedbackRequest,
    StreamFeedbackResponse,
    SubmitFeedbackBatchRequest,
    SubmitFeedbackBatchResponse,
    SubmitFeedbackRequest,
    SubmitFeedbackResponse,
)
from thumbwheel.v1.reward_pb2_grpc import RewardServiceStub

if TYPE_CHECKING:
    from thumbwheel.v1.reward_pb2_grpc import RewardServiceAsyncStub

NAME = "thumbwheel.v1.PreferenceService"
MAX_FEEDBACK_IDS = 1_000
MAX_BATCH = 1_000
MAX_STREAM = 10_000
RETRY_SECONDS = 1.0
AT_ONCE = 128
"""Pieces of a batch or a stream that wait for the database together."""

Context = grpc.aio.ServicerContext[Any, Any]


class Preferences(preference_pb2_grpc.PreferenceServiceServicer):
    """Implements `PreferenceService` on a database. `committed` is called after each commit that is to be published.

    `timeout`: longest that a retraction waits until what it takes back is recorded, in seconds.
    """

    def __init__(
        self,
        database: Database,
        curator: Curator,
        asking: Asking,
        eraser: Eraser,
        door: Door,
        clerk: Clerk,
        committed: Callable[[], None],
        timeout: float = 15.0,
    ) -> None:
        self._database = database
        self._curator = curator
        self._asking = asking
        self._eraser = eraser
        self._door = door
        self._clerk = clerk
        self._committed = committed
        self._timeout = timeout

    async def SubmitFeedback(self, request: SubmitFeedbackRequest, context: Context) -> SubmitFeedbackResponse:
        """Returns when the feedback is durable."""
        return await self._submit(request.feedback, _tenant(context), tracing.traceparent())

    async def SubmitFeedbackBatch(
        self, request: SubmitFeedbackBatchRequest, context: Context
    ) -> SubmitFeedbackBatchResponse:
        """Returns when everything that was not refused is durable."""
        with _counted():
            if len(request.feedback) > MAX_BATCH:
                raise errors.InvalidArgument(
                    f"holds {len(request.feedback)} pieces.", field="feedback", remedy=f"Send {MAX_BATCH} at a time."
                )
            tenant = _tenant(context)
        return SubmitFeedbackBatchResponse(results=await self._each(request.feedback, tenant, tracing.traceparent()))

    async def StreamFeedback(
        self, request_iterator: AsyncIterator[StreamFeedbackRequest], context: Context
    ) -> StreamFeedbackResponse:
        """Records what comes in, some at a time; returns when everything that was not refused is durable."""
        with _counted():
            tenant = _tenant(context)
        traceparent = tracing.traceparent()
        results: list[FeedbackResult] = []
        waiting: list[Feedback] = []
        async for request in request_iterator:
            with _counted():
                if len(results) + len(waiting) >= MAX_STREAM:
                    raise errors.InvalidArgument(
                        f"comes after {MAX_STREAM} others, which are recorded.",
                        field="feedback",
                        remedy="Open another stream, and send all of it there with the same keys.",
                    )
            waiting.append(request.feedback)
            if len(waiting) >= AT_ONCE:
                results += await self._each(waiting, tenant, traceparent)
                waiting = []
        results += await self._each(waiting, tenant, traceparent)
        return StreamFeedbackResponse(results=results)

    async def Retract(self, request: RetractRequest, context: Context) -> RetractResponse:
        """Returns when the retraction is durable."""
        with _counted():
            check_id(request.feedback_id, "feedback_id")
            check_id(request.user_id, "user_id")
            tenant = _tenant(context)
            waits = partial(inbox.holds, tenant=tenant, feedback_id=request.feedback_id)
            await self._clerk.settled(waits, self._timeout)
            recorded = await self._database.write(
                partial(
                    ledger.retract,
                    curator=self._curator,
                    feedback_id=request.feedback_id,
                    user_id=request.user_id,
                    tenant=tenant,
                    traceparent=tracing.traceparent(),
                )
            )
        if recorded.changed:
            metrics.told([recorded])
            self._committed()
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

    async def ListFeedback(self, request: ListFeedbackRequest, context: Context) -> ListFeedbackResponse:
        """Reads what is committed."""
        with _counted():
            listing.check(request)
            return await self._database.read(partial(listing.page, request=request, tenant=_tenant(context)))

    async def GetGuidelines(self, request: GetGuidelinesRequest, context: Context) -> GetGuidelinesResponse:
        """A version, made durable before it is shown to anybody."""
        with _counted():
            tenant = _tenant(context)
            if request.version:
                check_id(request.version, "version")
                return await self._database.read(partial(guide.version, tenant=tenant, wanted=request.version))
            newest = await self._database.read(partial(guide.newest, tenant=tenant))
            if newest is not None:
                return newest
            return await self._database.write(partial(guide.publish, tenant=tenant))

    async def NextComparison(self, request: NextComparisonRequest, context: Context) -> NextComparisonResponse:
        """Returns when it is durable what is shown, and with which propensity."""
        with _counted():
            check_id(request.user_id, "user_id")
            return await self._asking.next(_tenant(context), request.user_id)

    async def Forget(self, request: ForgetRequest, context: Context) -> ForgetResponse:
        """Returns when nothing of the user is left in any file of the collector."""
        with _counted():
            check_id(request.user_id, "user_id")
            return await self._eraser.forget(_tenant(context), request.user_id)

    async def _submit(self, feedback: Feedback, tenant: str, traceparent: str) -> SubmitFeedbackResponse:
        with _counted():
            acknowledged = await self._door.admit(Offer(tenant, feedback.SerializeToString(), traceparent))
        return self._answer(feedback, acknowledged)

    async def _each(self, feedback: Sequence[Feedback], tenant: str, traceparent: str) -> list[FeedbackResult]:
        """What became of each. They are written in their order, some at a time, which share commits."""
        found: list[FeedbackResult] = []
        for start in range(0, len(feedback), AT_ONCE):
            some = feedback[start : start + AT_ONCE]
            offers = [Offer(tenant, piece.SerializeToString(), traceparent) for piece in some]
            found += map(self._result, some, await self._door.admit_all(offers))
        return found

    def _result(self, feedback: Feedback, result: Result) -> FeedbackResult:
        if isinstance(result, errors.ThumbwheelError):
            metrics.refused(result)
            return FeedbackResult(refused=refusal(result))
        return FeedbackResult(recorded=self._answer(feedback, result))

    def _answer(self, feedback: Feedback, acknowledged: Acknowledged) -> SubmitFeedbackResponse:
        """Sees to what follows from an acknowledgement."""
        if acknowledged.changed:
            metrics.said(feedback)
            self._clerk.wake()
        else:
            metrics.DUPLICATES.inc()
        response = SubmitFeedbackResponse(feedback_id=acknowledged.feedback_id, duplicate=not acknowledged.changed)
        response.received_at.FromMicroseconds(acknowledged.received_at)
        return response


def refusal(error: errors.ThumbwheelError) -> FeedbackRefusal:
    """An error as one of many pieces of feedback is told it."""
    refused = FeedbackRefusal(code=error.code.value[0], message=str(error))
    if isinstance(error, errors.InvalidArgument):
        refused.field = error.field
    if isinstance(error, errors.ResourceExhausted):
        refused.retry_after = error.retry_after
    elif isinstance(error, errors.Unavailable | errors.DeadlineExceeded):
        refused.retry_after = RETRY_SECONDS
    return refused


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    try:
        yield
    except errors.ThumbwheelError as error:
        metrics.refused(error)
        raise


def _tenant(context: Context) -> str:
    tenant = serving.tenant(context)
    check_id(tenant, serving.TENANT_KEY)
    return tenant


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


@contextlib.asynccontextmanager
async def opened_door(settings: CollectorSettings) -> AsyncIterator[Door]:
    """Where feedback comes in, once its process runs; at the end, what waits there is made durable."""
    hand = AdmittingProcess(
        admitting.Order(
            settings.database_url,
            settings.keys_path,
            settings.max_text_bytes,
            settings.tenants_path,
            settings.log_level,
        )
    )
    door = Door(hand, max_pending=settings.max_pending_writes, timeout=settings.write_timeout_seconds)
    try:
        await asyncio.to_thread(hand.admit, [], [])  # it runs, or says why not
        yield door
    finally:
        await door.close()


async def collect(settings: CollectorSettings) -> None:
    """Runs the collector until SIGTERM. Feedback is taken while the broker is away, and published when it is back."""
    tenants = Tenants.load(settings.tenants_path)
    redaction = Redaction(tenants)
    curator = Curator(settings.rules)
    spools = Spools.of(settings)
    log = open_log(settings.bootstrap_servers, settings.kafka_tls)
    try:
        async with (
            opened(settings) as database,
            opened_door(settings) as door,
            reward_service(settings) as (reward, metadata),
        ):
            relay = Relay(database, log, settings, redaction)
            ingest = Ingest(database, log, settings, curator, relay.wake, tenants)
            assessor = Assessor(database, settings.rules, settings.assess_seconds, relay.wake)
            order = taking.Order(settings.database_url, settings.rules, settings.log_level)
            clerk = Clerk(database, door, TakingProcess(order), relay.wake, settings.max_backoff_seconds)
            eraser = Eraser(database, settings, tenants, relay.wake, spools, clerk)
            asking = Asking(database, reward, metadata, settings.shares, settings.pick_window)
            timeout = settings.write_timeout_seconds
            preferences = Preferences(database, curator, asking, eraser, door, clerk, relay.wake, timeout)
            await serving.serve(
                process="collector",
                listen=settings.listen,
                metrics_port=settings.metrics_port,
                services=[NAME],
                register=partial(preference_pb2_grpc.add_PreferenceServiceServicer_to_server, preferences),
                background={
                    "clerk": clerk.run,
                    "relay": relay.run,
                    "ingest": ingest.run,
                    "assessor": assessor.run,
                    "eraser": eraser.run,
                },
                drain_seconds=settings.drain_seconds,
                security=Security.load(settings),
                probe_port=settings.probe_port,
                control_listen=settings.control_listen,
            )
    finally:
        log.close()


@contextlib.asynccontextmanager
async def reward_service(settings: CollectorSettings) -> AsyncIterator[tuple[RewardServiceAsyncStub | None, Metadata]]:
    """The reward service, and what calls of it carry: the API key and certificates that the environment names."""
    if not settings.reward:
        yield None, ()
        return
    key, tls = key_from_environment(), ClientTls.from_environment()
    check_key(key, [settings.reward], tls, allow_insecure=settings.allow_insecure)
    async with open_channel(settings.reward, tls=tls) as channel:
        yield RewardServiceStub(channel), bearer(key)
