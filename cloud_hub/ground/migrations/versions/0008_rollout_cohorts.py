"""With whom a device was offered a release, and what was expected of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_rollout_cohorts"
down_revision = "0007_rounds"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; a rollout that runs already makes its expectations at the next look."""
    op.add_column("rollout_members", sa.Column("cohort", sa.Integer, nullable=False, server_default="0"))
    op.add_column("rollout_members", sa.Column("expected_wrong", sa.Float, nullable=False, server_default="0"))
    op.add_column("rollout_members", sa.Column("expected_weight", sa.Float, nullable=False, server_default="0"))


def downgrade() -> None:
    """Remove the columns."""
    for column in ("cohort", "expected_wrong", "expected_weight"):
        op.drop_column("rollout_members", column)
