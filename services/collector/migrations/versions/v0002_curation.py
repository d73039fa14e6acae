"""What is judged and superseded, decisions, raters, gold items, guidelines, aspects, pairs shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import Receipt, ReceiptClaims
from thumbwheel.v1.preference_pb2 import Feedback

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = ("shown", "aspects", "guidelines", "gold", "raters", "decision_votes", "decisions")
INDICES = (
    ("ix_generations_tenant_stored_at", "generations", ["tenant", "stored_at"]),
    ("ix_feedback_tenant_prompt_sha256", "feedback", ["tenant", "prompt_sha256"]),
    ("ix_feedback_tenant_user_id_item", "feedback", ["tenant", "user_id", "item"]),
)
BATCH = 1_000


def upgrade() -> None:
    """Goes to this version."""
    # Defaults are for the rows that are there already; what they hold is read out of the messages below.
    none = sa.text("X''") if op.get_bind().dialect.name == "sqlite" else sa.text("''::bytea")
    op.add_column("generations", sa.Column("prompt_sha256", sa.LargeBinary(32), nullable=True))
    op.add_column("generations", sa.Column("text_sha256", sa.LargeBinary(32), nullable=False, server_default=none))
    op.add_column("generations", sa.Column("version", sa.String(128), nullable=False, server_default=""))
    op.add_column("feedback", sa.Column("prompt_sha256", sa.LargeBinary(32), nullable=False, server_default=none))
    op.add_column("feedback", sa.Column("item", sa.LargeBinary(32), nullable=True))
    op.add_column("feedback", sa.Column("superseded_by", sa.String(128), nullable=True))
    op.add_column("feedback", sa.Column("weight", sa.Float(), nullable=False, server_default="0"))
    for name, table, columns in INDICES:
        op.create_index(name, table, columns)
    _create_decisions()
    _create_people()
    _fill_generations(op.get_bind())
    _fill_feedback(op.get_bind())


def downgrade() -> None:
    """Goes back to version 0001: verdicts, raters, guidelines and what was shown are forgotten."""
    for table in TABLES:
        op.drop_table(table)
    for name, table, _ in INDICES:
        op.drop_index(name, table)
    for column in ("prompt_sha256", "text_sha256", "version"):
        op.drop_column("generations", column)
    for column in ("prompt_sha256", "item", "superseded_by", "weight"):
        op.drop_column("feedback", column)
    op.execute("UPDATE feedback SET state = 'APART' WHERE state = 'SUPERSEDED'")


def _create_decisions() -> None:
    op.create_table(
        "decisions",
        sa.Column("sample_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("prompt_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(128), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("decided_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sample_id", name="pk_decisions"),
    )
    op.create_index("ix_decisions_tenant_prompt_sha256", "decisions", ["tenant", "prompt_sha256"])
    op.create_table(
        "decision_votes",
        sa.Column("sample_id", sa.String(128), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("feedback_id", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["sample_id"], ["decisions.sample_id"], name="fk_decision_votes_sample_id"),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.feedback_id"], name="fk_decision_votes_feedback_id"),
        sa.PrimaryKeyConstraint("sample_id", "place", name="pk_decision_votes"),
    )
    op.create_index("ix_decision_votes_feedback_id", "decision_votes", ["feedback_id"])


def _create_people() -> None:
    op.create_table(
        "raters",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("reliability", sa.Float(), nullable=False),
        sa.Column("votes", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(128), nullable=False),
        sa.Column("by_hand", sa.Boolean(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "user_id", name="pk_raters"),
    )
    op.create_table(
        "gold",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("item", sa.LargeBinary(32), nullable=False),
        sa.Column("chosen", sa.String(128), nullable=False),
        sa.Column("declared_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "item", name="pk_gold"),
    )
    op.create_table(
        "guidelines",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "number", name="pk_guidelines"),
        sa.UniqueConstraint("tenant", "version", name="uq_guidelines_tenant_version"),
    )
    op.create_table(
        "aspects",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("aspect", sa.String(64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("declared_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "aspect", name="pk_aspects"),
    )
    op.create_table(
        "shown",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("item", sa.LargeBinary(32), nullable=False),
        sa.Column("first_id", sa.String(128), nullable=False),
        sa.Column("second_id", sa.String(128), nullable=False),
        sa.Column("propensity", sa.Float(), nullable=False),
        sa.Column("strategy", sa.String(16), nullable=False),
        sa.Column("shown_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "user_id", "item", name="pk_shown"),
    )


def _fill_generations(connection: sa.Connection) -> None:
    """Reads prompt, text and version out of the generations that are there."""
    table = sa.table("generations", *(sa.column(name) for name in ("generation_id", "event", *_GENERATION)))
    for rows in _pages(connection, table.c.generation_id, table.c.event):
        values = []
        for id, data in rows:
            generation = GenerationEvent.FromString(data).generation
            values.append(
                {
                    "id": id,
                    "new_prompt_sha256": _claims(generation.receipt).prompt_sha256 or None,
                    "new_text_sha256": hashlib.sha256(generation.text.encode()).digest(),
                    "new_version": generation.spans[0].version[:128] if generation.spans else "",
                }
            )
        _fill(connection, table, table.c.generation_id, _GENERATION, values)


def _fill_feedback(connection: sa.Connection) -> None:
    """Says of the feedback that is there what it judged, and puts down the comparisons that were emitted."""
    names = ("feedback_id", "tenant", "prompt_id", "kind", "body", "state", "comparison_id", "received_at", *_FEEDBACK)
    table = sa.table("feedback", *(sa.column(name) for name in names))
    kept = [table.c[name] for name in names[:-3]]
    decisions = sa.table("decisions", *(sa.column(name) for name in _DECISION))
    votes = sa.table("decision_votes", *(sa.column(name) for name in ("sample_id", "place", "feedback_id")))
    for rows in _pages(connection, kept[0], *kept[1:]):
        values, decided, rests = [], [], []
        for id, tenant, prompt_id, kind, body, state, comparison_id, received_at in rows:
            claims = [_claims(receipt) for receipt in _receipts(Feedback.FromString(body), kind)]
            prompt, accepted = claims[0].prompt_sha256, state == "ACCEPTED"
            item = None
            if kind in ("comparison", "thumb", "edit"):
                judged = "\n".join([kind, *sorted(one.generation_id for one in claims)])
                item = hashlib.sha256(judged.encode()).digest()
            values.append({"id": id, "new_prompt_sha256": prompt, "new_item": item, "new_weight": float(accepted)})
            if comparison_id:
                state = "ACCEPTED" if accepted else "RETRACTED"
                reason = "" if accepted else "retracted_by_user"
                told = (comparison_id, "comparison", tenant, prompt_id, prompt, state, reason)
                revision = 1 if accepted else 2
                decided.append(dict(zip(_DECISION, (*told, float(accepted), revision, received_at), strict=True)))
                rests.append({"sample_id": comparison_id, "place": 0, "feedback_id": id})
        _fill(connection, table, table.c.feedback_id, _FEEDBACK, values)
        if decided:
            connection.execute(sa.insert(decisions), decided)
            connection.execute(sa.insert(votes), rests)


_GENERATION = ("prompt_sha256", "text_sha256", "version")
_FEEDBACK = ("prompt_sha256", "item", "weight")
_DECISION = (
    "sample_id", "kind", "tenant", "prompt_id", "prompt_sha256", "state", "reason", "weight", "revision", "decided_at"
)  # fmt: skip


def _claims(receipt: Receipt) -> ReceiptClaims:
    return ReceiptClaims.FromString(receipt.claims)


def _receipts(body: Feedback, kind: str) -> list[Receipt]:
    one = getattr(body, kind)
    return [one.a, one.b] if kind == "comparison" else [one.receipt]


def _pages(
    connection: sa.Connection, key: sa.ColumnClause[Any], *others: sa.ColumnClause[Any]
) -> Iterator[Sequence[Sequence[Any]]]:
    """All rows in the order of their key, some at a time: a database may be larger than memory."""
    last = ""
    while rows := connection.execute(sa.select(key, *others).where(key > last).order_by(key).limit(BATCH)).all():
        yield rows
        last = rows[-1][0]


def _fill(
    connection: sa.Connection,
    table: sa.TableClause,
    key: sa.ColumnClause[Any],
    names: Sequence[str],
    values: list[dict[str, Any]],
) -> None:
    filled: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in names}
    connection.execute(sa.update(table).where(key == sa.bindparam("id")).values(filled), values)
