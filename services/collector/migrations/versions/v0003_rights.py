"""Who asked, consent, what was erased and must not come back, and where copies lie."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from thumbwheel.v1.events_pb2 import GenerationEvent

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Goes to this version."""
    op.add_column("generations", sa.Column("user_id", sa.String(128), nullable=False, server_default=""))
    op.add_column("generations", sa.Column("consent", sa.Boolean(), nullable=False, server_default=sa.true()))
    _fill_in_users(op.get_bind())
    op.create_index("ix_generations_tenant_user_id", "generations", ["tenant", "user_id"])
    op.add_column("feedback", sa.Column("consent", sa.Boolean(), nullable=False, server_default=sa.true()))
    op.create_index("ix_outbox_key", "outbox", ["key"])
    op.create_table(
        "erasures",
        sa.Column("erasure_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("subject", sa.LargeBinary(32), nullable=True),
        sa.Column("feedback_erased", sa.Integer(), nullable=False),
        sa.Column("generations_erased", sa.Integer(), nullable=False),
        sa.Column("exported_rows_erased", sa.Integer(), nullable=False),
        sa.Column("exports_out_of_reach", sa.Text(), nullable=False),
        sa.Column("requested_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("erasure_id", name="pk_erasures"),
    )
    op.create_index("ix_erasures_subject", "erasures", ["subject"])
    op.create_table(
        "erased_samples",
        sa.Column("sample_id", sa.String(128), nullable=False),
        sa.Column("erasure_id", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.erasure_id"], name="fk_erased_samples_erasure_id"),
        sa.PrimaryKeyConstraint("sample_id", name="pk_erased_samples"),
    )
    op.create_index("ix_erased_samples_erasure_id", "erased_samples", ["erasure_id"])
    op.create_table(
        "tombstones",
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("erasure_id", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.erasure_id"], name="fk_tombstones_erasure_id"),
        sa.PrimaryKeyConstraint("hash", name="pk_tombstones"),
    )
    op.create_table(
        "exports",
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("path", sa.String(4096), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("host", "path", name="pk_exports"),
    )


def downgrade() -> None:
    """Goes back to the version before. What was erased stays erased, but may be taken in again from the stream."""
    for table in ("exports", "tombstones", "erased_samples", "erasures"):
        op.drop_table(table)
    op.drop_index("ix_outbox_key", "outbox")
    op.drop_column("feedback", "consent")
    op.drop_index("ix_generations_tenant_user_id", "generations")
    op.drop_column("generations", "consent")
    op.drop_column("generations", "user_id")


def _said(event: GenerationEvent) -> dict[str, str | bool]:
    return {"user": event.user_id[:128], "agreed": not event.HasField("consent") or event.consent}


def _fill_in_users(connection: sa.Connection) -> None:
    """Takes user and consent out of each event, a page at a time."""
    table = sa.table("generations", *(sa.column(name) for name in ("generation_id", "event", "user_id", "consent")))
    after = ""
    while True:
        page = connection.execute(
            sa.select(table.c.generation_id, table.c.event)
            .where(table.c.generation_id > after)
            .order_by(table.c.generation_id)
            .limit(500)
        ).all()
        if not page:
            return
        said = [{"id": id, **_said(GenerationEvent.FromString(event))} for id, event in page]
        here = sa.update(table).where(table.c.generation_id == sa.bindparam("id"))
        connection.execute(here.values(user_id=sa.bindparam("user"), consent=sa.bindparam("agreed")), said)
        after = page[-1].generation_id
