"""The one `MetaData` that every room's tables belong to.

Tables are declared in `<room>/tables.py` (the ground's own: `audit.py`, `auth.py`) and are private to their room.
What the database holds is decided by the migrations alone; a test compares both.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
