"""A download takes no more memory for being long; `python -m tests.live.download_memory` measures a large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.limits import MIB
from tests.live.download_memory import measure

ALLOWED_ABOVE_REST_BYTES = 60 * MIB


@pytest.mark.parametrize("daily_mib", [0, 200], ids=["at once", "in slices"])
def test_a_download_that_is_longer_than_what_it_may_take_does_not_take_it(tmp_path: Path, daily_mib: int) -> None:
    found = measure(tmp_path, mib=72, daily_mib=daily_mib)
    assert found.above_bytes < ALLOWED_ABOVE_REST_BYTES
    assert (tmp_path / "blobs").is_dir()
