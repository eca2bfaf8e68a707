"""The parts of python-tuf and securesystemslib that the house uses, imported in this one place.

The serializer is named so that it is loaded with the rest, before a verifier gives up its rights. Both libraries
re-export their public classes without saying so in a way that strict type checking accepts.
"""

from __future__ import annotations

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import (  # type: ignore[attr-defined]
    CryptoSigner,
    Key,
    Signature,
    Signer,
    SSlibKey,
)
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import CanonicalJSONSerializer

__all__ = [
    "CanonicalJSONSerializer",
    "CryptoSigner",
    "DelegatedRole",
    "Delegations",
    "Key",
    "LengthOrHashMismatchError",
    "MetaFile",
    "Metadata",
    "Role",
    "Root",
    "SSlibKey",
    "Signature",
    "Signed",
    "Signer",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
    "UnverifiedSignatureError",
    "encode_canonical",
]
