"""NextComparison: reads what may be shown, asks the reward model what it is unsure of, draws, and notes it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import grpc.aio
from sqlalchemy import Connection, select

from services.collector import picked, picking
from services.collector.database import Database
from services.collector.picked import Pair
from services.collector.picking import Eligible
from services.collector.rules import Shares
from services.collector.tables import generations
from thumbwheel import errors
from thumbwheel.channels import Metadata
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import NextComparisonResponse, PickStrategy
from thumbwheel.v1.reward_pb2 import CompareRequest, CompareResponse

if TYPE_CHECKING:
    from thumbwheel.v1.reward_pb2_grpc import RewardServiceAsyncStub

logger = logging.getLogger(__name__)

POOL = 16
"""The newest pairs are those that the reward model is asked about."""
COMPARE_SECONDS = 3.0
TRIES = 3


@dataclass
class Asking:
    """Picks pairs. Without a `reward` stub, by chance and by duel alone."""

    database: Database
    reward: RewardServiceAsyncStub | None = None
    metadata: Metadata = ()
    shares: Shares = field(default_factory=Shares)
    window: int = 2_000
    draw: random.Random = field(default_factory=random.SystemRandom)

    async def next(self, tenant: str, user_id: str) -> NextComparisonResponse:
        """A pair that this user has not seen. Raises `errors.NotFound` where there is none."""
        for _ in range(TRIES):
            found = await self.database.read(
                partial(picking.eligible, tenant=tenant, user_id=user_id, window=self.window)
            )
            if not found:
                break
            unsure = await self._unsure(found[:POOL])
            pick = picking.pick(picking.probabilities(found, self.shares, unsure), self.draw)
            note = partial(picked.note, tenant=tenant, user_id=user_id, pair=pick.pair)
            if await self.database.write(partial(note, propensity=pick.propensity, strategy=pick.strategy)):
                events = await self.database.read(partial(_events, ids=pick.pair))
                first, second = events[pick.pair.first], events[pick.pair.second]
                return NextComparisonResponse(
                    prompt=first.prompt,
                    a=first.generation,
                    b=second.generation,
                    propensity=pick.propensity,
                    strategy=PickStrategy.Value(f"PICK_STRATEGY_{pick.strategy}"),
                )
        raise errors.NotFound(
            f"There are no two responses that {user_id!r} has not seen.",
            remedy="Ask the policy for candidates, and ask again when they have arrived.",
        )

    async def _unsure(self, pool: Sequence[Eligible]) -> dict[Pair, float]:
        """How unsure the reward model is of pairs. Those that it does not answer for in time are left out, which are
        all where there is none, or it is away.
        """
        if self.reward is None:
            return {}
        events = await self.database.read(partial(_events, ids={id for one in pool for id in one.pair}))
        asked = [self._compare(self.reward, events[one.pair.first], events[one.pair.second]) for one in pool]
        answers = await asyncio.gather(*asked)
        faults = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        if faults:
            fault = str(errors.from_rpc_error(faults[0]))
            logger.warning("picked without the reward model", extra={"pairs": len(faults), "error": fault})
        return {
            one.pair: unsureness(answer)
            for one, answer in zip(pool, answers, strict=True)
            if isinstance(answer, CompareResponse)
        }

    async def _compare(
        self, reward: RewardServiceAsyncStub, a: GenerationEvent, b: GenerationEvent
    ) -> CompareResponse | grpc.aio.AioRpcError:
        request = CompareRequest(prompt=a.prompt, response_a=a.generation.text, response_b=b.generation.text)
        try:
            return await reward.Compare(request, timeout=COMPARE_SECONDS, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            return error


def unsureness(answer: CompareResponse) -> float:
    """How unsure the reward model is of a pair: the more, the more a vote on it teaches.

    That is how far the members of its ensemble are apart (Christiano et al., 2017, arXiv 1706.03741, section 2.2.4). A
    probability near 1/2 may also be that of two responses known to be alike, of which votes teach nothing; so it is
    taken only of a model that has no ensemble. Models of both kinds are never live together.
    """
    return answer.uncertainty if answer.HasField("uncertainty") else 0.5 - abs(answer.probability_a - 0.5)


def _events(connection: Connection, ids: Collection[str]) -> dict[str, GenerationEvent]:
    rows = connection.execute(
        select(generations.c.generation_id, generations.c.event).where(generations.c.generation_id.in_(list(ids)))
    )
    return {id: GenerationEvent.FromString(data) for id, data in rows}
