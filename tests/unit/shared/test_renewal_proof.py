"""What a renewal's proof binds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.ids import DeviceId
from shared.renewal import DOMAIN, csr_digest, proof_message

names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.tuples(names, digests, digests), st.tuples(names, digests, digests))
def test_two_messages_are_equal_only_if_all_that_they_bind_is(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    def message(parts: tuple[str, str, str]) -> bytes:
        return proof_message(device=DeviceId(parts[0]), csr_sha256=parts[1], ca_fingerprint=parts[2])

    assert (message(one) == message(other)) == (one == other)
    assert message(one).startswith(DOMAIN)


def test_a_request_is_known_by_its_text() -> None:
    assert csr_digest("a") == csr_digest("a") != csr_digest("b")
    assert len(csr_digest("")) == 64
