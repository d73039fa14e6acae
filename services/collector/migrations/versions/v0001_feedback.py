"""Feedback, generations, the outbox and the positions in the stream."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Goes to this version."""
    row_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "generations",
        sa.Column("generation_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("event", sa.LargeBinary(), nullable=False),
        sa.Column("stored_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("generation_id", name="pk_generations"),
    )
    op.create_index("ix_generations_prompt_id", "generations", ["prompt_id"])
    op.create_table(
        "feedback",
        sa.Column("feedback_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=False),
        sa.Column("body_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(128), nullable=False),
        sa.Column("comparison_id", sa.String(128), nullable=True),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("feedback_id", name="pk_feedback"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_feedback_tenant_idempotency_key"),
    )
    op.create_index("ix_feedback_prompt_id", "feedback", ["prompt_id"])
    held = sa.text("state = 'HELD'")
    op.create_index("ix_feedback_held", "feedback", ["feedback_id"], sqlite_where=held, postgresql_where=held)
    op.create_table(
        "feedback_generations",
        sa.Column("feedback_id", sa.String(128), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("generation_id", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.feedback_id"], name="fk_feedback_generations_feedback_id"),
        sa.PrimaryKeyConstraint("feedback_id", "place", name="pk_feedback_generations"),
    )
    op.create_index("ix_feedback_generations_generation_id", "feedback_generations", ["generation_id"])
    op.create_table(
        "outbox",
        sa.Column("id", row_number, autoincrement=True, nullable=False),
        sa.Column("event_id", sa.String(128), nullable=False),
        sa.Column("topic", sa.String(128), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("schema", sa.String(128), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("traceparent", sa.String(128), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("published_at", sa.BigInteger(), nullable=True),
        sa.Column("refused", sa.String(512), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sqlite_autoincrement=True,
    )
    unpublished = sa.text("published_at IS NULL")
    op.create_index("ix_outbox_unpublished", "outbox", ["id"], sqlite_where=unpublished, postgresql_where=unpublished)
    op.create_table(
        "positions",
        sa.Column("topic", sa.String(128), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("topic", "partition", name="pk_positions"),
    )
    op.create_table(
        "topic_ids",
        sa.Column("topic", sa.String(128), nullable=False),
        sa.Column("topic_id", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("topic", name="pk_topic_ids"),
    )


def downgrade() -> None:
    """Goes back to an empty database."""
    for table in ("topic_ids", "positions", "outbox", "feedback_generations", "feedback", "generations"):
        op.drop_table(table)
