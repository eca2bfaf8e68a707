"""The round of each task of a federated run: by it old ones are removed, and the newest are found."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_round_tasks"
down_revision = "0008_rollout_cohorts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, filled from the attempts' names (`12t1` is of round 12), and its index."""
    op.add_column("round_tasks", sa.Column("round", sa.Integer, nullable=False, server_default="0"))
    # SQLite takes the digits that a text begins with by itself, PostgreSQL wants to be asked for them.
    if op.get_bind().dialect.name == "sqlite":
        op.execute("UPDATE round_tasks SET round = CAST(grouping AS INTEGER)")
    else:
        op.execute("UPDATE round_tasks SET round = CAST(substring(grouping from '^[0-9]+') AS INTEGER)")
    op.create_index("ix_round_tasks_newest", "round_tasks", ["run", "round", "asked_ms"])


def downgrade() -> None:
    """Remove both."""
    op.drop_index("ix_round_tasks_newest", "round_tasks")
    op.drop_column("round_tasks", "round")
