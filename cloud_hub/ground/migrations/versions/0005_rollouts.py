"""Rollouts, their devices, and what was decided of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_rollouts"
down_revision = "0004_figures"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(160), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("family", sa.String(63), nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollouts")),
        sa.UniqueConstraint("number", name=op.f("uq_rollouts_number")),
    )
    op.create_index(op.f("ix_rollouts_family"), "rollouts", ["family"])
    op.create_table(
        "rollout_members",
        sa.Column("rollout", sa.String(160), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("profile", sa.String(63), nullable=False),
        sa.Column("condition", sa.String(16), nullable=False),
        sa.Column("wish", sa.String(16), nullable=False),
        sa.Column("before", sa.String(64), nullable=True),
        sa.Column("assignment_version", sa.BigInteger, nullable=False),
        sa.Column("offered_ms", sa.BigInteger, nullable=False),
        sa.Column("resolved_ms", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("acknowledged", sa.Boolean, nullable=False),
        sa.Column("settled", sa.Boolean, nullable=False),
        sa.Column("stranded", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("rollout", "position", name=op.f("pk_rollout_members")),
        sa.UniqueConstraint("rollout", "device", name=op.f("uq_rollout_members_rollout")),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"], name=op.f("fk_rollout_members_rollout_rollouts")),
    )
    op.create_table(
        "rollout_decisions",
        sa.Column("rollout", sa.String(160), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(160), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("readings", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("rollout", "seq", name=op.f("pk_rollout_decisions")),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"], name=op.f("fk_rollout_decisions_rollout_rollouts")),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("rollout_decisions", "rollout_members", "rollouts"):
        op.drop_table(table)
