"""Which model is meant, and its files: the releases room as this room sees it.

A family is a model of the protocol, a release's version its version. Without a version the newest published one is
meant, else, for those who may ask candidates, the newest that is ready. What is found is believed for `FRESH_US`, so
that a request costs no look into the database, and a new release is seen within that time.

Devices may not ask candidates: they take the hub's word for better than their own and keep it as a label, so somebody
has to have signed for the model; and what anybody may have loaded is bounded by what was meant for use.

Not here: engines.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloud_hub.releases.desk import Desk as ReleasesDesk
from cloud_hub.releases.desk import ModelRow
from shared import limits
from shared.errors import InvalidValue, ModelError
from shared.ids import parse_family, parse_version
from shared.model import Manifest, Variant, decode_manifest
from shared.wire.golden import GoldenSet, decode_golden

FRESH_US: Final = 2_000_000
_MAX_KNOWN: Final = 256


@dataclass(frozen=True, slots=True)
class Release:
    """A version that can be loaded, and the versions that there are of its family."""

    manifest: Manifest
    versions: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Family and version."""
        return self.manifest.family, self.manifest.version


@dataclass(frozen=True, slots=True)
class Files:
    """What an engine is made of."""

    variant: Variant
    model: bytes
    golden: GoldenSet


class Registry:
    """Releases by name.

    Args:
        releases: the releases room.
        now_us: a monotonic clock.
    """

    def __init__(self, *, releases: ReleasesDesk, now_us: Callable[[], int]) -> None:
        self._catalogue = releases.catalogue
        self._blobs = releases.blobs
        self._now_us = now_us
        self._known: OrderedDict[tuple[str, str, bool], tuple[Release, int]] = OrderedDict()

    async def find(self, family: str, version: str, *, candidates: bool) -> Release:
        """The release of this name; an empty version means the one that is served.

        Args:
            candidates: whether one that is built and not published may be meant.

        Raises:
            ModelError: `model.unknown` when there is none, or it is not ready.
        """
        key = (family, version, candidates)
        known = self._known.get(key)
        if known is not None and self._now_us() - known[1] < FRESH_US:
            return known[0]
        release = await self._look_up(family, version, candidates=candidates)
        self._known[key] = (release, self._now_us())
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return release

    def files(self, manifest: Manifest) -> Files:
        """The files of the variant that suits the hub, hashed again; blocks.

        Raises:
            ModelError: no variant of it runs here.
            StorageError: a file is gone or has rotted.
        """
        for variant in manifest.variants:
            # In the publisher's order of preference: int8 first, which on a server's CPU is the fastest too.
            if variant.runtime == "onnx":
                model = self._blobs.read(variant.file.digest, max_bytes=limits.MAX_MODEL_BYTES)
                golden = self._blobs.read(manifest.golden.file.digest, max_bytes=limits.MAX_GOLDEN_BYTES)
                return Files(variant=variant, model=model, golden=decode_golden(golden, manifest.signature))
        raise ModelError(f"no variant of {manifest.family}/{manifest.version} runs on the hub", code="model.variant")

    async def _look_up(self, family: str, version: str, *, candidates: bool) -> Release:
        try:
            parse_family(family)
            if version:
                parse_version(version)
        except InvalidValue as error:
            raise _unknown(family, version) from error
        rows = [row for row in await self._rows(family) if row.state == "ready"]
        ready = [row for row in rows if candidates or row.published_ms is not None]
        wanted = [row for row in ready if row.version == version] if version else _newest(ready)
        if not wanted:
            raise _unknown(family, version)
        data = await asyncio.to_thread(self._catalogue.manifest, wanted[0])
        return Release(manifest=decode_manifest(data), versions=tuple(row.version for row in ready))

    async def _rows(self, family: str) -> list[ModelRow]:
        found: list[ModelRow] = []
        after = (family, "")
        while True:
            page = await self._catalogue.page(family=family, after=after, limit=limits.MAX_PAGE_ITEMS)
            found.extend(page)
            if len(page) < limits.MAX_PAGE_ITEMS:
                return found
            after = (family, page[-1].version)


def _newest(ready: list[ModelRow]) -> list[ModelRow]:
    published = [row for row in ready if row.published_ms is not None]
    return sorted(published or ready, key=lambda row: row.release_counter or 0, reverse=True)[:1]


def _unknown(family: str, version: str) -> ModelError:
    name = f"{family[:63]}/{version[:64]}" if version else family[:63]
    return ModelError(
        f"there is no model {name!r} that is ready", code="model.unknown", hint="`outrider model ls` lists them"
    )
