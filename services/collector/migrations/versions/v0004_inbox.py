"""What is acknowledged waits in an inbox, and is recorded from there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from thumbwheel import errors

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_DOOR = "door"
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Goes to this version."""
    if _has_schemas():
        op.execute(sa.schema.CreateSchema(_DOOR, if_not_exists=True))
    op.create_table(
        "inbox",
        sa.Column("seq", _ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("feedback_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=False),
        sa.Column("body_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=False),
        sa.Column("propensity", sa.Float(), nullable=True),
        sa.Column("traceparent", sa.String(128), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_inbox"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_inbox_tenant_idempotency_key"),
        schema=_DOOR,
    )
    op.create_index("ix_inbox_feedback_id", "inbox", ["feedback_id"], schema=_DOOR)


def downgrade() -> None:
    """Goes back to the version before, which would never record what waits: refused until nothing does."""
    waiting = op.get_bind().execute(sa.text(f"SELECT count(*) FROM {_DOOR}.inbox")).scalar_one()
    if waiting:
        raise errors.FailedPrecondition(
            f"{waiting} pieces of feedback are acknowledged and not recorded yet.",
            remedy="Let this version's collector run until thumbwheel_collector_inbox_depth is 0, and try again.",
        )
    op.drop_table("inbox", schema=_DOOR)
    if _has_schemas():
        op.execute(sa.schema.DropSchema(_DOOR))


def _has_schemas() -> bool:
    """SQLite's schema is a file, which is attached before the migrations run."""
    return op.get_bind().dialect.name != "sqlite"
