"""Power cuts: a file system that forgets what was not synced, under a writer that stands still at a random moment.

LazyFS (github.com/dsrhaslab/lazyfs) has to be on the PATH; five cuts here, `python -m tests.live.outbox_trial --cuts N`
for more (docs/outbox-faults.md).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.live.outbox_trial import lazyfs, stop_writers

pytestmark = pytest.mark.live


def test_what_was_promised_outlives_the_power(short_tmp: Path) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no FUSE here: /dev/fuse is missing or closed to this user")
    if shutil.which("lazyfs") is None or shutil.which("fusermount3") is None:
        pytest.skip("lazyfs and fusermount3 are not on the PATH")
    with lazyfs(short_tmp) as (mounted, cut):
        judge = stop_writers(mounted / "outbox", rounds=5, seed=7, cut=cut)
    assert len(judge.promised) > 5 * 20
