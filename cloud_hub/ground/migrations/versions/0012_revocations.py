"""Whether a device is welcome, and the serial number and issuer of each certificate, by which it can be revoked.

Certificates from before have neither: they are void at the hub when they are revoked, but cannot be put onto a
revocation list. They end within a month.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_revocations"
down_revision = "0011_patches"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; every device is in good standing."""
    op.add_column("devices", sa.Column("standing", sa.String(16), nullable=False, server_default=""))
    op.add_column("devices", sa.Column("standing_reason", sa.Text, nullable=False, server_default=""))
    op.add_column("devices", sa.Column("standing_ms", sa.BigInteger, nullable=True))
    op.create_index("ix_devices_standing", "devices", ["standing"])
    op.add_column("device_certificates", sa.Column("serial", sa.String(40), nullable=False, server_default=""))
    op.add_column("device_certificates", sa.Column("authority", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    """Remove them."""
    op.drop_column("device_certificates", "authority")
    op.drop_column("device_certificates", "serial")
    op.drop_index("ix_devices_standing", "devices")
    op.drop_column("devices", "standing_ms")
    op.drop_column("devices", "standing_reason")
    op.drop_column("devices", "standing")
