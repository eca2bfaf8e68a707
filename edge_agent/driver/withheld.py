"""Installed releases that the trust rules do not stand behind any more: they stay where they are, and are not served.

A device that starts serves what it has while the verifier looks at it. What turns out not to hold is withheld from then
on. It keeps its slot and its files, because a mistyped profile or a file that the disk has changed shall cost no model:
it comes back with the first assignment that is accepted with it, or at the next start at which it holds, and goes when
an accepted assignment replaces it or leaves it out. Where the release before it still holds, that one serves instead.
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

    def trust(self, verified: VerifiedAssignment) -> frozenset[Digest]:
        """Let go of what both signatures stand behind now, and say what that was."""
        freed = self._digests.intersection([model.manifest_digest for model in verified.models])
        if freed:
            self.hold(self._digests - freed)
        return freed
