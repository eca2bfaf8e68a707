"""The tree of errors. A leaf exists only where the one who catches it acts differently.

    OutriderError                       code, hint; `retry` says whether trying again can help
    ├── ConfigError                     the configuration cannot be used (exit 78)
    ├── InvalidValue                    a value from outside does not parse or is out of bounds
    ├── ProtocolViolation               the other side sent what the protocol does not allow
    ├── TrustError                      metadata or an artefact was refused; carries the attack's name
    ├── TransferError                   bytes did not arrive
    │   ├── Unreachable                 nobody answered; try again later
    │   ├── TransferRefused             the server said no; trying again will not help
    │   ├── TransferCorrupt             what arrived is not what was promised
    │   └── PatchFailed                 a patch makes something else; fetch the whole file
    ├── ModelError                      a model cannot be loaded or run
    │   ├── InputRefused                the caller's tensors do not fit the declared signature
    │   └── HostLost                    the process that held the model is gone
    ├── StorageError                    the disk refused or holds something else than we wrote
    │   └── StorageFull                 no room
    └── Conflict                        the state has moved on, or the name is taken

A policy's "no" (ladder, gate, admission) is a value with a reason and not an exception.
Adapters translate foreign exceptions at the port with `raise … from`.
"""

from __future__ import annotations


class OutriderError(Exception):
    """Something went wrong that a person or the caller can act on.

    Attributes:
        code: stable dotted identifier, safe to script against (`trust.rollback`).
        hint: what to do about it, one sentence; empty when nothing can be done.
        retry: whether the same call can succeed later without anyone changing anything.
    """

    code = "error"
    retry = False

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code


class ConfigError(OutriderError):
    """The configuration cannot be used; the message names the key and the nearest known one."""

    code = "config"


class InvalidValue(OutriderError):
    """A value from outside does not parse or lies outside its bounds."""

    code = "invalid"


class ProtocolViolation(OutriderError):
    """The other side sent something that the protocol does not allow."""

    code = "protocol"


class TrustError(OutriderError):
    """Metadata or an artefact was refused.

    The code names the attack that the refusal stops, in the words of the TUF specification, section 1.5.2, and of
    Uptane: `trust.signature`, `trust.digest` and `trust.unknown_target` (arbitrary software), `trust.rollback`,
    `trust.freeze`, `trust.mix_and_match`, `trust.endless_data`, `trust.malformed`, `trust.wrong_device`,
    `trust.wrong_hardware`; below `trust.time` what is wrong with an attested time. docs/updates.md and docs/time.md
    say what each means to an operator.
    """

    code = "trust"


class TransferError(OutriderError):
    """Bytes did not arrive."""

    code = "transfer"


class Unreachable(TransferError):
    """Nobody answered in time; trying again later can help."""

    code = "transfer.unreachable"
    retry = True


class TransferRefused(TransferError):
    """The server answered and said no."""

    code = "transfer.refused"


class TransferCorrupt(TransferError):
    """What arrived is not what was promised (length or digest)."""

    code = "transfer.corrupt"


class ModelError(OutriderError):
    """A model cannot be loaded or run."""

    code = "model"


class InputRefused(ModelError):
    """The caller's tensors do not fit the declared signature; the caller can mend it."""

    code = "model.input"


class HostLost(ModelError):
    """The process that held the model ended before it answered."""

    code = "model.host_lost"
    retry = True


class PatchFailed(TransferError):
    """A patch does not make what it promised; the whole file still can be fetched."""

    code = "transfer.patch"


class StorageError(OutriderError):
    """The disk refused, or holds something else than what was written."""

    code = "storage"


class StorageFull(StorageError):
    """There is no room left."""

    code = "storage.full"
    retry = True


class Conflict(OutriderError):
    """The state has moved on since the caller looked, or a name is taken."""

    code = "conflict"
