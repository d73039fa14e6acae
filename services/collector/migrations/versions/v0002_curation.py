"""What is judged and superseded, decisions, raters, gold items, guidelines, aspects, pairs shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import FinishReason, Receipt, ReceiptClaims
from thumbwheel.v1.preference_pb2 import Feedback, Preference, ThumbValue

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BATCH = 1_000

_TABLES = (
    "shown", "aspects", "guidelines", "gold", "raters", "tallies", "prompts", "decision_votes", "decisions"
)  # fmt: skip
_INDICES = (
    ("ix_generations_tenant_stored_at", "generations", ["tenant", "stored_at"]),
    ("ix_feedback_tenant_group_id", "feedback", ["tenant", "group_id"]),
    ("ix_feedback_tenant_user_id_item", "feedback", ["tenant", "user_id", "item"]),
)


def upgrade() -> None:
    """Goes to this version."""
    _add_columns()
    for name, table, columns in _INDICES:
        op.create_index(name, table, columns)
    _create_decisions()
    _create_raters()
    _create_asking()
    _fill_generations(op.get_bind())
    _fill_feedback(op.get_bind())


def downgrade() -> None:
    """Goes back to version 0001: verdicts, raters, guidelines and what was shown are forgotten."""
    op.execute("UPDATE feedback SET state = 'APART' WHERE state IN ('SUPERSEDED', 'QUARANTINED')")
    for table in _TABLES:
        op.drop_table(table)
    for name, table, _ in _INDICES:
        op.drop_index(name, table)
    for column in ("prompt_sha256", "text_sha256", "empty", "cut", "version"):
        op.drop_column("generations", column)
    for column in (
        *("item", "choice", "outcome", "sample_id", "edit_sha256", "propensity", "user_rank", "tenant_rank"),
        *("joined", "group_id", "released", "superseded_by", "weight", "revision"),
    ):
        op.drop_column("feedback", column)


def _add_columns() -> None:
    # Defaults are for the rows that are there already; what they hold is read out of their messages afterwards.
    nothing = sa.text("X''") if op.get_bind().dialect.name == "sqlite" else sa.text("''::bytea")
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("prompt_sha256", sa.LargeBinary(32), nullable=True),
        sa.Column("text_sha256", sa.LargeBinary(32), nullable=False, server_default=nothing),
        sa.Column("empty", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("cut", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("version", sa.String(128), nullable=False, server_default=""),
    )
    for column in columns:
        op.add_column("generations", column)
    columns = (
        sa.Column("item", sa.LargeBinary(32), nullable=True),
        sa.Column("choice", sa.String(8), nullable=True),
        sa.Column("outcome", sa.LargeBinary(32), nullable=True),
        sa.Column("sample_id", sa.String(128), nullable=True),
        sa.Column("edit_sha256", sa.LargeBinary(32), nullable=True),
        sa.Column("propensity", sa.Float(), nullable=True),
        sa.Column("user_rank", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("tenant_rank", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("joined", sa.String(32), nullable=True),
        sa.Column("group_id", sa.String(128), nullable=True),
        sa.Column("released", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("superseded_by", sa.String(128), nullable=True),
        sa.Column("weight", sa.Float(), nullable=False, server_default="0"),
        sa.Column("revision", sa.Integer(), nullable=False, server_default="2"),
    )
    for column in columns:
        op.add_column("feedback", column)


def _create_decisions() -> None:
    op.create_table(
        "decisions",
        sa.Column("sample_id", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("group_id", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(128), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("decided_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sample_id", name="pk_decisions"),
    )
    op.create_index("ix_decisions_tenant_group_id", "decisions", ["tenant", "group_id"])
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
    row_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "prompts",
        sa.Column("number", row_number, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("prompt_id", sa.String(128), nullable=False),
        sa.Column("group_id", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_prompts"),
        sa.UniqueConstraint("tenant", "prompt_id", name="uq_prompts_tenant_prompt_id"),
        sqlite_autoincrement=True,
    )


def _create_raters() -> None:
    op.create_table(
        "tallies",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "user_id", "day", name="pk_tallies"),
    )
    op.create_table(
        "raters",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("reliability", sa.Float(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("votes", sa.Integer(), nullable=False),
        sa.Column("judged", sa.Float(), nullable=False),
        sa.Column("gold_judged", sa.Integer(), nullable=False),
        sa.Column("gold_correct", sa.Integer(), nullable=False),
        sa.Column("quarantine", sa.String(32), nullable=False),
        sa.Column("bursts", sa.Text(), nullable=False),
        sa.Column("by_hand", sa.String(16), nullable=False),
        sa.Column("stale", sa.Boolean(), nullable=False),
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


def _create_asking() -> None:
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
    """Reads out of the generations that are there what is now a column."""
    names = ("prompt_sha256", "text_sha256", "empty", "cut", "version")
    table = sa.table("generations", *(sa.column(name) for name in ("generation_id", "event", *names)))
    for rows in _pages(connection, table.c.generation_id, table.c.event):
        values = []
        for id, data in rows:
            generation = GenerationEvent.FromString(data).generation
            read = (
                _claims(generation.receipt).prompt_sha256 or None,
                hashlib.sha256(generation.text.encode()).digest(),
                not generation.text.strip(),
                generation.finish_reason == FinishReason.FINISH_REASON_LENGTH,
                generation.spans[-1].version[:128] if generation.spans else "",
            )
            values.append({"id": id, **dict(zip((f"new_{name}" for name in names), read, strict=True))})
        _fill(connection, table, table.c.generation_id, names, values)


def _fill_feedback(connection: sa.Connection) -> None:
    """Says of the feedback that is there what it judged, and puts down the comparisons that were emitted."""
    names = ("feedback_id", "tenant", "prompt_id", "kind", "body", "state", "reason", "comparison_id", "received_at")
    new = ("item", "choice", "outcome", "sample_id", "edit_sha256", "joined", "group_id", "weight")
    told = (
        *("sample_id", "kind", "tenant", "prompt_id", "group_id", "state", "reason", "weight"),
        *("revision", "decided_at"),
    )
    table = sa.table("feedback", *(sa.column(name) for name in (*names, *new)))
    decisions = sa.table("decisions", *(sa.column(name) for name in told))
    votes = sa.table("decision_votes", *(sa.column(name) for name in ("sample_id", "place", "feedback_id")))
    for rows in _pages(connection, *(table.c[name] for name in names)):
        values, decided, rests = [], [], []
        for id, tenant, prompt_id, kind, body, state, reason, comparison_id, received_at in rows:
            accepted = state == "ACCEPTED"
            joined = {"HELD": None, "APART": "receipt_mismatch" if reason == "receipt_mismatch" else ""}.get(state, "")
            group = None if joined is None else prompt_id
            item, choice, outcome, edit = _judged(Feedback.FromString(body), kind)
            sample = (comparison_id or id) if item else None
            read = (item, choice, outcome, sample, edit, joined, group, float(accepted))
            values.append({"id": id, **dict(zip((f"new_{name}" for name in new), read, strict=True))})
            if comparison_id:
                how = ("ACCEPTED", "preferred", 1.0, 1) if accepted else ("RETRACTED", "retracted_by_user", 0.0, 2)
                what = (comparison_id, "comparison", tenant, prompt_id, prompt_id)
                decided.append(dict(zip(told, (*what, *how, received_at), strict=True)))
                rests.append({"sample_id": comparison_id, "place": 0, "feedback_id": id})
        _fill(connection, table, table.c.feedback_id, new, values)
        if decided:
            connection.execute(sa.insert(decisions), decided)
            connection.execute(sa.insert(votes), rests)
    connection.execute(
        sa.text(
            "INSERT INTO prompts (tenant, prompt_id, group_id) SELECT tenant, prompt_id, prompt_id FROM feedback"
            " WHERE group_id IS NOT NULL GROUP BY tenant, prompt_id ORDER BY min(received_at), prompt_id"
        )
    )


def _judged(body: Feedback, kind: str) -> tuple[bytes | None, str | None, bytes | None, bytes | None]:
    """What is judged, how, which outcome that is, and the digest of an edit's text."""
    edit = None
    if kind == "comparison":
        vote = body.comparison
        ids = [_claims(vote.a).generation_id, _claims(vote.b).generation_id]
        choice = Preference.Name(vote.preference).removeprefix("PREFERENCE_").lower()
        outcome = {"a": ids[0], "b": ids[1]}.get(choice, choice).encode()
    elif kind == "thumb":
        ids = [_claims(body.thumb.receipt).generation_id]
        choice = ThumbValue.Name(body.thumb.value).removeprefix("THUMB_VALUE_").lower()
        outcome = choice.encode()
    elif kind == "edit":
        ids, choice = [_claims(body.edit.receipt).generation_id], "a"
        outcome = edit = hashlib.sha256(body.edit.text.encode()).digest()
    else:
        return None, None, None, None
    item = hashlib.sha256("\n".join([kind, *sorted(ids)]).encode()).digest()
    return item, choice, hashlib.sha256(item + outcome).digest(), edit


def _claims(receipt: Receipt) -> ReceiptClaims:
    return ReceiptClaims.FromString(receipt.claims)


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
