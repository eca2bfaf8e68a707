"""The audit chain notices every altered, removed or inserted row."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from cloud_hub.ground import audit
from tests.fakes.hub_parts import hub_database

TAMPERING = {
    "detail": "UPDATE audit SET detail = '{}' WHERE seq = 3",
    "actor": "UPDATE audit SET actor = 'somebody' WHERE seq = 3",
    "time": "UPDATE audit SET at_ms = 0 WHERE seq = 3",
    "hash": "UPDATE audit SET hash = 'x' WHERE seq = 3",
    "removed": "DELETE FROM audit WHERE seq = 3",
    "swapped": "UPDATE audit SET seq = 99 WHERE seq = 2",
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_shows(tmp_path: Path, statement: str) -> None:
    with hub_database(tmp_path) as database:
        for number in range(5):
            database.write_now(
                lambda conn, number=number: audit.record(  # type: ignore[misc]
                    conn, at_ms=number, actor="op", action="did", subject="it", detail={"number": number, "ü": None}
                )
            )
        assert database.read_now(audit.verify) == audit.AuditVerdict(rows=5, broken_at=None)
        database.write_now(lambda conn: conn.execute(sa.text(statement)))
        assert database.read_now(audit.verify).broken_at is not None


def test_rows_come_back_in_pages(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:
        for number in range(3):
            database.write_now(
                lambda conn, number=number: audit.record(  # type: ignore[misc]
                    conn, at_ms=1, actor="op", action="did", subject=str(number), detail={"a": [1, {"b": "c"}]}
                )
            )
        rows = database.read_now(lambda conn: audit.entries(conn, after=1, limit=1))
    assert [(row.seq, row.subject, row.detail) for row in rows] == [(2, "1", {"a": [1, {"b": "c"}]})]
