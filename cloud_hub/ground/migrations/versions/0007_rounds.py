"""Federated runs, the devices' numbers in them, their tasks and the results of their rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_rounds"
down_revision = "0005_rollouts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "round_runs",
        sa.Column("run", sa.String(32), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("head", sa.Text, nullable=False),
        sa.Column("family", sa.String(63), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(160), nullable=False),
        sa.Column("finished_ms", sa.BigInteger, nullable=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("checkpoint", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("run", name=op.f("pk_round_runs")),
    )
    op.create_index("ix_round_runs_state", "round_runs", ["state"])
    op.create_table(
        "round_nodes",
        sa.Column("node", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("node", name=op.f("pk_round_nodes")),
        sa.UniqueConstraint("device", name=op.f("uq_round_nodes_device")),
    )
    op.create_table(
        "round_tasks",
        sa.Column("message", sa.String(64), nullable=False),
        sa.Column("run", sa.String(32), nullable=False),
        sa.Column("grouping", sa.String(32), nullable=False),
        sa.Column("node", sa.BigInteger, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("asked_ms", sa.BigInteger, nullable=False),
        sa.Column("replied_ms", sa.BigInteger, nullable=True),
        sa.Column("closed", sa.Boolean, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=True),
        sa.Column("file", sa.String(80), nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("message", name=op.f("pk_round_tasks")),
        sa.ForeignKeyConstraint(["run"], ["round_runs.run"], name=op.f("fk_round_tasks_run_round_runs")),
    )
    op.create_index("ix_round_tasks_run", "round_tasks", ["run", "grouping"])
    op.create_table(
        "round_results",
        sa.Column("run", sa.String(32), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run", "round", name=op.f("pk_round_results")),
        sa.ForeignKeyConstraint(["run"], ["round_runs.run"], name=op.f("fk_round_results_run_round_runs")),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("round_results", "round_tasks", "round_nodes", "round_runs"):
        op.drop_table(table)
