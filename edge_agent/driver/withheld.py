"""Installed releases that the trust rules do not stand behind any more: they stay where they are, and are not served.

A device that starts serves what it has while the verifier looks at it. What turns out not to hold is withheld from then
on, and comes back with the first assignment that is accepted with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from shared.ids import Digest, FamilyName
from shared.release import VerifiedAssignment


class Withheld:
    """Which releases are not served, by the digests of their manifests."""

    def __init__(self, route: Callable[[FamilyName], None], families: Collection[FamilyName]) -> None:
        """
        Args:
            route: says anew where a family's requests go.
            families: those that there are, as they come.
        """
        self._route = route
        self._families = families
        self._digests: frozenset[Digest] = frozenset()

    def __contains__(self, digest: object) -> bool:
        """Whether this release is withheld."""
        return digest in self._digests

    def names(self, verified: VerifiedAssignment) -> bool:
        """Whether a release of this assignment is withheld, so that nothing of it is to be installed."""
        return any(model.manifest_digest in self._digests for model in verified.models)

    def hold(self, digests: frozenset[Digest]) -> None:
        """Withhold these releases and no others."""
        self._digests = digests
        for family in tuple(self._families):
            self._route(family)

    def trust(self, verified: VerifiedAssignment) -> None:
        """Let go of what both signatures stand behind now."""
        if self._digests:
            self.hold(self._digests.difference([model.manifest_digest for model in verified.models]))
