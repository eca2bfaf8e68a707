"""kill -9 while records are put, handed out and settled: what was promised is there, and no number is given twice.

Five kills here; `python -m tests.live.outbox_trial --kills 100` for more (docs/outbox-faults.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.outbox_trial import stop_writers

pytestmark = pytest.mark.live


def test_nothing_promised_is_lost_and_no_number_repeats(tmp_path: Path) -> None:
    judge = stop_writers(tmp_path / "outbox", rounds=5, seed=7)
    assert len(judge.promised) > 5 * 20
    assert judge.settled
