"""Which authorities a device was told with its certificate, and what answers a repeated renewal."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013_renewals"
down_revision = "0012_revocations"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; certificates that are here stay without a row: nobody knows what their device was told."""
    op.create_table(
        "certificate_issues",
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("told", sa.String(255), nullable=False),
        sa.Column("csr_sha256", sa.String(64), nullable=False),
        sa.Column("renews", sa.String(64), nullable=True),
        sa.Column("pem", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_certificate_issues")),
        sa.ForeignKeyConstraint(
            ["fingerprint"],
            ["device_certificates.fingerprint"],
            name=op.f("fk_certificate_issues_fingerprint_device_certificates"),
        ),
    )
    op.create_index("ix_certificate_issues_csr", "certificate_issues", ["csr_sha256"])


def downgrade() -> None:
    """Forget it."""
    op.drop_table("certificate_issues")
