"""The tables. `migrations/` builds them; a test holds that both agree.

    feedback ──< feedback_generations >── generations      what was said, of what
    outbox                                                 what is to be published, and what has been
    positions, topic_ids                                   where reading goes on, and how far writing got

Times are microseconds since the epoch, so that both databases keep and order them alike. Messages are kept serialised,
as they came: a field that this code does not know survives.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    literal_column,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the key is declared INTEGER.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")

generations = Table(
    "generations",
    metadata,
    Column("generation_id", String(128), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("prompt_id", String(128), nullable=False, index=True),
    Column("event", LargeBinary, nullable=False, doc="The GenerationEvent: prompt, text, tokens, logprobs, spans."),
    Column("stored_at", BigInteger, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("feedback_id", String(128), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("idempotency_key", String(128), nullable=False),
    Column("body_sha256", LargeBinary(32), nullable=False, doc="Of the Feedback, serialised deterministically."),
    Column("user_id", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("body", LargeBinary, nullable=False, doc="The Feedback."),
    Column("prompt_id", String(128), nullable=False, index=True),
    Column("state", String(16), nullable=False, doc="Name of the FeedbackState, without its prefix."),
    Column("reason", String(128), nullable=False),
    Column("comparison_id", String(128), nullable=True),
    Column("received_at", BigInteger, nullable=False),
    UniqueConstraint("tenant", "idempotency_key"),
)
# Spelt out, not a parameter: SQLite uses a partial index only for a condition that it can see to be the index's own.
held = feedback.c.state == literal_column("'HELD'")
Index("ix_feedback_held", feedback.c.feedback_id, sqlite_where=held, postgresql_where=held)

# No foreign key to generations: feedback may arrive before the generation does.
feedback_generations = Table(
    "feedback_generations",
    metadata,
    Column("feedback_id", String(128), ForeignKey(feedback.c.feedback_id), primary_key=True),
    Column("place", Integer, primary_key=True, doc="0 for the first response, or the only one."),
    Column("generation_id", String(128), nullable=False, index=True),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", RowNumber, primary_key=True, autoincrement=True, doc="The order of publishing."),
    Column("event_id", String(128), nullable=False),
    Column("topic", String(128), nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("schema", String(128), nullable=False, doc="Full name of the message."),
    Column("value", LargeBinary, nullable=False, doc="The message."),
    Column("traceparent", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("published_at", BigInteger, nullable=True),
    Column("refused", String(512), nullable=True, doc="Why the broker will never take it; empty otherwise."),
    sqlite_autoincrement=True,
)
unpublished = outbox.c.published_at.is_(None)
Index("ix_outbox_unpublished", outbox.c.id, sqlite_where=unpublished, postgresql_where=unpublished)

positions = Table(
    "positions",
    metadata,
    Column("topic", String(128), primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("offset", BigInteger, nullable=False, doc="Read topics: the next record. Written: one past the last acked."),
)

topic_ids = Table(
    "topic_ids",
    metadata,
    Column("topic", String(128), primary_key=True),
    Column("topic_id", String(128), nullable=False, doc="The log that the topic's positions are offsets of."),
)
