"""When a device's certificate was first used: from then on the one before it is not renewed any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_used_certificates"
down_revision = "0013_renewals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; what was used before is noted when it is used again."""
    op.add_column("device_certificates", sa.Column("used_ms", sa.BigInteger, nullable=True))
    op.create_index("ix_certificate_issues_renews", "certificate_issues", ["renews"])


def downgrade() -> None:
    """Remove it."""
    op.drop_index("ix_certificate_issues_renews", "certificate_issues")
    op.drop_column("device_certificates", "used_ms")
