"""What gates read: answers, right and wrong, and times, per device, release and minute."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_figures"
down_revision = "0003_telemetry"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "telemetry_figures",
        sa.Column("family", sa.String(63), nullable=False),
        sa.Column("minute", sa.BigInteger, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("answered", sa.BigInteger, nullable=False),
        sa.Column("right", sa.BigInteger, nullable=False),
        sa.Column("wrong", sa.BigInteger, nullable=False),
        sa.Column("latency", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("family", "minute", "device", "version", name=op.f("pk_telemetry_figures")),
    )


def downgrade() -> None:
    """Remove the table."""
    op.drop_table("telemetry_figures")
