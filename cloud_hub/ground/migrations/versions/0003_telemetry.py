"""Records, their streams, and the batches that brought them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_telemetry"
down_revision = "0002_releases"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "telemetry_records",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("received_ms", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("device", "epoch", "klass", "seq", name=op.f("uq_telemetry_records_device")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_telemetry_records_device", "telemetry_records", ["device", "klass", "id"])
    op.create_table(
        "telemetry_streams",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("ranges", sa.LargeBinary, nullable=False),
        sa.Column("records", sa.BigInteger, nullable=False),
        sa.Column("duplicates", sa.BigInteger, nullable=False),
        sa.Column("conflicts", sa.BigInteger, nullable=False),
        sa.Column("first_received_ms", sa.BigInteger, nullable=False),
        sa.Column("last_received_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("device", "epoch", "klass", name=op.f("pk_telemetry_streams")),
    )
    op.create_table(
        "telemetry_batches",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("device", "epoch", "klass", "first", "last", name=op.f("pk_telemetry_batches")),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("telemetry_batches", "telemetry_streams", "telemetry_records"):
        op.drop_table(table)
