"""A tie, from the vote to the loss: collector, stream and reward model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from services.collector.config import CollectorSettings
from services.collector.curation import CurationSettings
from services.collector.database import Database
from services.collector.intake import Curator
from services.collector.rules import Rules
from services.collector.submission import Checker
from tests.support import make_tiny_llama
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, Deployment, published, store
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from trainer import batch, models, publish
from trainer.buffer import Buffer
from trainer.ingest import Encoder, Ingest
from trainer.losses.reward import Reward, TieModel

TIE_RATE = 0.35


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper", "none"])
async def test_a_tie_reaches_the_loss_where_there_is_a_model_of_ties(ties: TieModel, tmp_path: Path) -> None:
    """A model without an opinion gives a tie just the probability that the setting says."""
    settings, deployment = CollectorSettings(home=tmp_path), Deployment.at(tmp_path)
    database = Database(settings.database_url)
    pair = deployment.pair("abc", "de")
    await store(database, *pair)
    submission = Checker(deployment.key, 1_000).check(parts.comparison(*pair, TIE), tenant="default")
    await parts.record(database, submission, curator=Curator(Rules(CurationSettings(publish_ties=True))))
    log = MemoryLog()
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    producer = log.producer()
    for event in await published(database):
        producer.send(topics.COMPARISONS, b"key", event.SerializeToString()).result(1.0)
    database.close()

    base = make_tiny_llama(tmp_path / "base", seed=0)
    publish.write_scorer(base, tmp_path / "scorer")
    objective = Reward(ties=ties, tie_rate=TIE_RATE, length_balance=False)
    encoder = Encoder(base, max_length=64, scores_text=True)
    ingest = Ingest(log, producer, encoder, task="r", start={}, topic_ids={}, learns_from=objective.learns_from)
    buffer = Buffer()
    ingest.read(buffer, 5.0)
    samples = buffer.oldest(9)
    if ties == "none":
        assert samples == []
    else:
        model = models.load_scorer(tmp_path / "scorer").float()
        found = objective.loss(model, batch.collate(batch.whole(samples)), {})
        assert found.losses.tolist() == pytest.approx([-math.log(TIE_RATE)])
    ingest.close()
    log.close()
