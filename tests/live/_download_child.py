"""The agent's core, composed as the daemon does it as far as bringing files in goes: says `idle`, then brings one file.

python -m tests.live._download_child STATE HUB_URL CA CERTIFICATE KEY LENGTH DIGEST DAILY_BYTES
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from edge_agent import main as _main  # noqa: F401 - what the daemon holds in memory is held here too
from edge_agent.adapters.database import Database
from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.ledger import SqliteLedger
from edge_agent.adapters.shelf import FileShelf
from edge_agent.adapters.system import SystemClock, SystemMoments
from edge_agent.adapters.tls import dated_context
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.metering import Meter
from shared.ids import Digest
from shared.model import FileRef


async def bring(arguments: list[str]) -> None:
    state, url, ca, certificate, key, length, digest, daily_bytes = arguments
    clock = SystemClock()
    database = await Database.open(Path(state) / "agent.db", clock=clock)
    try:
        context = dated_context(
            Path(ca), now_ms=SystemClock().wall_ms, certificate_path=Path(certificate), key_path=Path(key)
        )
        fetcher = HubFetcher(hub_url=url, context=context, clock=clock)
        meter = Meter(
            ledger=SqliteLedger(database),
            moments=SystemMoments(),
            daily_bytes=int(daily_bytes),
            note=lambda name, detail: None,
        )
        file = FileRef(path="models/a/1.0.0/int8.onnx", length=int(length), digest=Digest(digest))
        bringing = Supplies(fetcher=fetcher, meter=meter).bringing(
            shelf=FileShelf(Path(state)),
            models_bytes=2 * file.length,
            kept=lambda: {file.digest: file},
            make_room=lambda: None,
        )
        await meter.load()
        print("idle", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await bringing.bring((file,), (), note=lambda name, detail: None)
        await bringing.check(file)
        print("done", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    finally:
        await database.close()


if __name__ == "__main__":
    asyncio.run(bring(sys.argv[1:]))
