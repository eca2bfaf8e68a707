"""Patches between the files of releases: what was made, and what was tried and does not pay."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_patches"
down_revision = "0010_batches"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "patches",
        sa.Column("base", sa.String(64), primary_key=True),
        sa.Column("result", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=True),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("full_length", sa.BigInteger, nullable=False),
        sa.Column("full_packed", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("made_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_patches_result", "patches", ["result"])


def downgrade() -> None:
    """Remove it; the files stay as blobs that nothing names."""
    op.drop_index("ix_patches_result", "patches")
    op.drop_table("patches")
