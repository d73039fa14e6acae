"""The tables. `migrations/` builds them; a test holds that both agree.

    feedback ──< feedback_generations >── generations      what was said, of what
    outbox                                                 what is to be published, and what has been
    positions, topic_ids                                   where reading goes on, and how far writing got
    erasures ──< erased_samples    tombstones    exports   what was erased, must not come back, and was copied where

Times are microseconds since the epoch, so that both databases keep and order them alike. Messages are kept serialised,
as they came: a field that this code does not know survives.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    true,
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
    Column("user_id", String(128), nullable=False, server_default="", doc="Who asked; empty: not known."),
    Index("ix_generations_tenant_user_id", "tenant", "user_id"),
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
    Column("consent", Boolean, nullable=False, server_default=true(), doc="Whether it may be learnt from."),
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
    Column("key", LargeBinary, nullable=False, index=True),
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

erasures = Table(
    "erasures",
    metadata,
    Column("erasure_id", String(128), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("subject", LargeBinary(32), nullable=True, index=True, doc="Hash of the user; none: what was too old."),
    Column("feedback_erased", Integer, nullable=False),
    Column("generations_erased", Integer, nullable=False),
    Column("exported_rows_erased", Integer, nullable=False),
    Column("exports_out_of_reach", Text, nullable=False, doc="Paths, one a line."),
    Column("requested_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger, nullable=True, doc="When it was off the disk; none: still to be done."),
)

erased_samples = Table(
    "erased_samples",
    metadata,
    Column("sample_id", String(128), primary_key=True, doc="Of a comparison, a thumb or feedback: says nothing."),
    Column("erasure_id", String(128), ForeignKey(erasures.c.erasure_id), nullable=False, index=True),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("hash", LargeBinary(32), primary_key=True, doc="Of a user or of a prompt's id, with the tenant."),
    Column("erasure_id", String(128), ForeignKey(erasures.c.erasure_id), nullable=False),
)

exports = Table(
    "exports",
    metadata,
    Column("host", String(255), primary_key=True),
    Column("path", String(4096), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
