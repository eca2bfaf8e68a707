"""A `Renewer` that is told what to say."""

from __future__ import annotations

from edge_agent.ports import CertificateLife
from shared.errors import OutriderError


class FakeRenewer:
    """Says what is in `answers`, one after the other; the last again and again."""

    def __init__(self, *answers: CertificateLife | OutriderError) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.looked = 0

    async def renew(self) -> CertificateLife:
        """The next answer."""
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OutriderError):
            raise answer
        return answer

    async def look(self) -> CertificateLife:
        """Dates that are far apart."""
        self.looked += 1
        return CertificateLife(not_before_ms=1, not_after_ms=10**15)
