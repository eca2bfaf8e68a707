"""Models and their builds, signed metadata, and assignments."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_releases"
down_revision = "0001_devices"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "models",
        sa.Column("family", sa.String(63), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("step", sa.String(64), nullable=False),
        sa.Column("push", sa.Text, nullable=False),
        sa.Column("build", sa.Integer, nullable=False),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(160), nullable=False),
        sa.Column("finished_ms", sa.BigInteger, nullable=True),
        sa.Column("report", sa.Text, nullable=True),
        sa.Column("release_counter", sa.BigInteger, nullable=True),
        sa.Column("min_release_counter", sa.BigInteger, nullable=True),
        sa.Column("published_ms", sa.BigInteger, nullable=True),
        sa.Column("published_by", sa.String(160), nullable=True),
        sa.PrimaryKeyConstraint("family", "version", name=op.f("pk_models")),
        sa.UniqueConstraint("family", "release_counter", name=op.f("uq_models_family")),
    )
    op.create_table(
        "release_files",
        sa.Column("family", sa.String(63), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("family", "version", "position", name=op.f("pk_release_files")),
        sa.ForeignKeyConstraint(
            ["family", "version"], ["models.family", "models.version"], name=op.f("fk_release_files_family_models")
        ),
    )
    op.create_table(
        "signed_metadata",
        sa.Column("role", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.Column("stored_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("role", "version", name=op.f("pk_signed_metadata")),
    )
    op.create_table(
        "assignments",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.Column("assignment", sa.Text, nullable=False),
        sa.Column("issued_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(160), nullable=False),
        sa.PrimaryKeyConstraint("device", "version", name=op.f("pk_assignments")),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("assignments", "signed_metadata", "release_files", "models"):
        op.drop_table(table)
