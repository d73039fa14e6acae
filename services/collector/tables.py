"""The tables. `migrations/` builds them; a test holds that both agree.

    door.inbox                                             what was acknowledged, and is still to be recorded
    feedback ──< feedback_generations >── generations      what was said, of what
    decisions ──< decision_votes >── feedback              what is learnt from, and the votes that it rests on
    prompts, tallies                                       what is curated together, and how much came of whom
    raters, gold                                           how far each user is trusted, and what that is measured by
    guidelines, aspects                                    how people are told to judge
    shown                                                  pairs that were picked to be compared
    outbox                                                 what is to be published, and what has been
    positions, topic_ids                                   where reading goes on, and how far writing got
    erasures ──< erased_samples    tombstones    exports   what was erased, must not come back, and was copied where

The inbox has a schema of its own: in SQLite that is a file beside the record's, so that acknowledging waits for nobody
who writes there.

Times are microseconds since the epoch, so that both databases keep and order them alike. Messages are kept serialised,
as they came: a field that this code does not know survives.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
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

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=_NAMES)
DOOR = "door"
"""The inbox's schema."""

# SQLite numbers rows by itself only where the key is declared INTEGER.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")

inbox = Table(
    "inbox",
    MetaData(naming_convention=_NAMES, schema=DOOR),
    Column("seq", RowNumber, primary_key=True, autoincrement=True, doc="The order in which they are recorded."),
    Column("feedback_id", String(128), nullable=False, index=True),
    Column("tenant", String(128), nullable=False),
    Column("idempotency_key", String(128), nullable=False),
    Column("body_sha256", LargeBinary(32), nullable=False, doc="Of the Feedback, serialised deterministically."),
    Column("user_id", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("body", LargeBinary, nullable=False, doc="The Feedback."),
    Column("prompt_id", String(128), nullable=False),
    Column("consent", Boolean, nullable=False, doc="Whether it may be learnt from."),
    Column("propensity", Float, nullable=True, doc="Of having been shown what was compared, in this order."),
    Column("traceparent", String(128), nullable=False),
    Column("received_at", BigInteger, nullable=False),
    UniqueConstraint("tenant", "idempotency_key"),
)

generations = Table(
    "generations",
    metadata,
    Column("generation_id", String(128), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("prompt_id", String(128), nullable=False, index=True),
    Column("event", LargeBinary, nullable=False, doc="The GenerationEvent: prompt, text, tokens, logprobs, spans."),
    Column("stored_at", BigInteger, nullable=False),
    Column("prompt_sha256", LargeBinary(32), nullable=True, doc="Of the prompt; empty where no receipt attests it."),
    Column("text_sha256", LargeBinary(32), nullable=False, doc="Of the response's text."),
    Column("empty", Boolean, nullable=False, doc="The text holds nothing visible."),
    Column("cut", Boolean, nullable=False, doc="It ended because it reached its greatest length."),
    Column("version", String(128), nullable=False, doc="The policy version that wrote its last token."),
    Index(None, "tenant", "stored_at"),
    Column("user_id", String(128), nullable=False, server_default="", doc="Who asked; empty: not known."),
    Column("consent", Boolean, nullable=False, server_default=true(), doc="Whether it may be learnt from."),
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
    # What is judged, and how: none for comments and implicit signals.
    Column("item", LargeBinary(32), nullable=True, doc="Of a user's writes on one item, the last one stands."),
    Column("choice", String(8), nullable=True, doc="a, b, tie, both_bad, up or down."),
    Column("outcome", LargeBinary(32), nullable=True, doc="The same judgement of the item has the same one."),
    Column("sample_id", String(128), nullable=True, doc="What it teaches: the user's first id of that outcome."),
    Column("edit_sha256", LargeBinary(32), nullable=True, doc="Of an edit's text."),
    Column("propensity", Float, nullable=True, doc="Of having been shown what was compared, in this order."),
    Column("user_rank", Integer, nullable=False, doc="Feedback that the user had given before it on that UTC day."),
    Column("tenant_rank", Integer, nullable=False, doc="The same of all the tenant's users."),
    # What became of it.
    Column("joined", String(32), nullable=True, doc="Empty where it may teach, else why not; none while it waits."),
    Column("group_id", String(128), nullable=True, doc="The prompt's group, which is curated together; once joined."),
    Column("released", Boolean, nullable=False, doc="An operator has seen it: it is not quarantined."),
    Column("superseded_by", String(128), nullable=True),
    Column("weight", Float, nullable=False, doc="With which it is learnt from; 0 where it is not."),
    Column("revision", Integer, nullable=False, doc="How often it has been told of."),
    Column("consent", Boolean, nullable=False, server_default=true(), doc="Whether it may be learnt from."),
    UniqueConstraint("tenant", "idempotency_key"),
    Index(None, "tenant", "group_id"),
    Index(None, "tenant", "user_id", "item"),
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

decisions = Table(
    "decisions",
    metadata,
    Column("sample_id", String(128), primary_key=True, doc="The comparison's or the unpaired thumb's id."),
    Column("kind", String(16), nullable=False, doc="comparison or thumb."),
    Column("tenant", String(128), nullable=False),
    Column("prompt_id", String(128), nullable=False),
    Column("group_id", String(128), nullable=False),
    Column("state", String(16), nullable=False, doc="ACCEPTED or RETRACTED, as was last published."),
    Column("reason", String(128), nullable=False),
    Column("weight", Float, nullable=False),
    Column("revision", Integer, nullable=False, doc="How often it has been published."),
    Column("decided_at", BigInteger, nullable=False),
    Index(None, "tenant", "group_id"),
)

decision_votes = Table(
    "decision_votes",
    metadata,
    Column("sample_id", String(128), ForeignKey(decisions.c.sample_id), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("feedback_id", String(128), ForeignKey(feedback.c.feedback_id), nullable=False, index=True),
)

prompts = Table(
    "prompts",
    metadata,
    Column("number", RowNumber, primary_key=True, autoincrement=True, doc="The order in which they were grouped."),
    Column("tenant", String(128), nullable=False),
    Column("prompt_id", String(128), nullable=False),
    Column("group_id", String(128), nullable=False, doc="Id of the first prompt like it."),
    UniqueConstraint("tenant", "prompt_id"),
    sqlite_autoincrement=True,
)

tallies = Table(
    "tallies",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("user_id", String(128), primary_key=True, doc="Empty: all the tenant's users."),
    Column("day", Integer, primary_key=True, autoincrement=False, doc="UTC days since the epoch."),
    Column("count", Integer, nullable=False, doc="Pieces of feedback received."),
)

raters = Table(
    "raters",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("reliability", Float, nullable=False, doc="Probability of judging as the truth is."),
    Column("weight", Float, nullable=False, doc="What a vote of the rater weighs."),
    Column("votes", Integer, nullable=False),
    Column("judged", Float, nullable=False, doc="Votes that others, or gold, could judge."),
    Column("gold_judged", Integer, nullable=False),
    Column("gold_correct", Integer, nullable=False),
    Column("quarantine", String(32), nullable=False, doc="Why the account is quarantined; empty: it is not."),
    Column("bursts", Text, nullable=False, doc="JSON: intervals of received_at whose votes are quarantined."),
    Column("by_hand", String(16), nullable=False, doc="QUARANTINED or RELEASED by an operator; else empty."),
    Column("stale", Boolean, nullable=False, doc="What the rater judged is yet to be curated by this row."),
    Column("updated_at", BigInteger, nullable=False),
)

gold = Table(
    "gold",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("item", LargeBinary(32), primary_key=True, doc="The pair, as in feedback."),
    Column("chosen", String(128), nullable=False, doc="The generation that is better beyond doubt."),
    Column("declared_at", BigInteger, nullable=False),
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", String(128), nullable=False),
    Column("document", LargeBinary, nullable=False, doc="The GetGuidelinesResponse."),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("tenant", "version"),
)

aspects = Table(
    "aspects",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("aspect", String(64), primary_key=True),
    Column("text", Text, nullable=False, doc="How to judge it, in Markdown."),
    Column("declared_at", BigInteger, nullable=False),
)

shown = Table(
    "shown",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("item", LargeBinary(32), primary_key=True, doc="The pair, as in feedback."),
    Column("first_id", String(128), nullable=False, doc="The generation to be shown first."),
    Column("second_id", String(128), nullable=False),
    Column("propensity", Float, nullable=False, doc="Probability of this pair in this order."),
    Column("strategy", String(16), nullable=False, doc="RANDOM, DUEL or UNCERTAIN."),
    Column("shown_at", BigInteger, nullable=False),
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
