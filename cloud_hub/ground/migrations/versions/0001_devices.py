"""Audit, tokens and devices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001_devices"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=True),
        sa.Column("revoked_ms", sa.BigInteger, nullable=True),
        sa.Column("last_used_ms", sa.BigInteger, nullable=True),
    )
    op.create_table(
        "join_tokens",
        sa.Column("secret_sha256", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("device", sa.String(63), nullable=True),
        sa.Column("profile", sa.String(63), nullable=True),
        sa.Column("uses", sa.Integer, nullable=False),
        sa.Column("uses_left", sa.Integer, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.CheckConstraint("uses_left >= 0", name=op.f("ck_join_tokens_uses_left")),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("profile", sa.String(63), nullable=False),
        sa.Column("enrolled_ms", sa.BigInteger, nullable=False),
        sa.Column("online", sa.Boolean, nullable=False),
        sa.Column("last_seen_ms", sa.BigInteger, nullable=True),
        sa.Column("boot", sa.BigInteger, nullable=False),
        sa.Column("session", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("agent_version", sa.String(64), nullable=False),
        sa.Column("assignment_version", sa.BigInteger, nullable=False),
        sa.Column("reported_boot", sa.BigInteger, nullable=False),
        sa.Column("reported_revision", sa.BigInteger, nullable=False),
        sa.Column("reported_ms", sa.BigInteger, nullable=True),
        sa.Column("reported", sa.Text, nullable=False),
    )
    op.create_table(
        "device_labels",
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id", name="fk_device_labels_device_devices")),
        sa.Column("key", sa.String(63), nullable=False),
        sa.Column("value", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("device", "key", name=op.f("pk_device_labels")),
    )
    op.create_index("ix_device_labels_key", "device_labels", ["key", "value"])
    op.create_table(
        "device_certificates",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column(
            "device",
            sa.String(63),
            sa.ForeignKey("devices.id", name="fk_device_certificates_device_devices"),
            nullable=False,
        ),
        sa.Column("issued_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.Column("revoked_ms", sa.BigInteger, nullable=True),
    )
    op.create_index("ix_device_certificates_device", "device_certificates", ["device"])


def downgrade() -> None:
    """Remove the tables."""
    for table in ("device_certificates", "device_labels", "devices", "join_tokens", "api_tokens", "audit"):
        op.drop_table(table)
