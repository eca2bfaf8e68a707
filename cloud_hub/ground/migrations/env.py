"""Alembic's entry: runs the migrations on the connection that `ground/migrate.py` hands over, in its transaction.

Alembic executes this file; nothing imports it.
"""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # Our caller has begun the transaction and commits it: all migrations or none.
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
