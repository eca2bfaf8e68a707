"""`outrider-hub keys init | sign | show`: the part of a key ceremony that needs no hub and no network.

Rules: a private key never leaves the directory where it was made, and no command reads two holders' keys; whoever signs
sees every key that there will be, not only what changes; a machine remembers the root that it followed last
(`trusted-root.json` beside the keys) and signs nothing that does not follow from it; without that file, nothing but
what follows from a first root that one of its keys has signed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub import files
from cloud_hub.cli import screen
from cloud_hub.ground.system import SystemClock
from cloud_hub.keyring import OFFLINE, ONLINE, TRUSTED_ROOT, Keyring, read_public
from shared.errors import Conflict, InvalidValue, StorageError, TrustError
from shared.trust import ceremony, drafts, repository
from shared.trust.authority import short
from shared.trust.drafts import Draft, Quorum
from shared.trust.library import Key, Signer
from shared.trust.repository import RoleKeys
from shared.trust.roles import ROOT, TARGETS

PUBLIC_SUFFIX: Final = ".pub.json"


class MadeKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was made, for `--json`."""

    role: str
    keyid: str
    file: str
    public: str


def init(arguments: argparse.Namespace) -> int:
    """Make keys on this machine, or put the first root together from public halves."""
    if arguments.out is not None:
        if arguments.draft or arguments.public or arguments.threshold:
            raise _usage("--out makes keys; --draft with --public and --threshold puts a root together")
        return _make_keys(arguments)
    if arguments.role or arguments.online or arguments.count != 1:
        raise _usage("--role, --online and --count go with --out DIR, which makes keys")
    if not arguments.public:
        raise _usage("a root is put together from public halves: give --public FILE or DIR, once or several times")
    return _first_draft(arguments)


def sign(arguments: argparse.Namespace) -> int:
    """Sign what a draft still needs with the keys of one directory."""
    path, keyring = Path(arguments.draft), Keyring(Path(arguments.keys))
    draft, signers = read_draft(path), keyring.signers()
    now_ms = SystemClock().wall_ms()
    drafts.check_draft(draft, now_ms=now_ms)
    _require_known(draft, keyring, signers, is_sure=arguments.yes)
    screen.note("\n".join(drafts.describe(draft)))
    signed, added = drafts.add_signatures(draft, signers)
    if not added:
        asked = {keyid for quorum in drafts.quorums(draft) for keyid in quorum.keyids}
        mine = [signer.public_key.keyid for signer in signers]
        raise Conflict(
            "these keys have signed already"
            if asked & set(mine)
            else f"nothing in {path} asks for {', '.join(short(keyid) for keyid in mine)}",
            code="conflict.signed",
            hint=f"`outrider-hub keys show {path}` says whose signatures are missing",
        )
    for role, keyid in added:
        screen.note(f"key {short(keyid)} signs {role}")
    if not arguments.yes:
        _ask("sign this?")
    _write(path, drafts.encode_draft(signed))
    _remember(signed, keyring)
    _show_state(path, signed, as_json=arguments.json)
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Show a draft with its missing signatures, or a public half."""
    path = Path(arguments.file)
    if path.name.endswith(PUBLIC_SUFFIX):
        role, key = read_public(path)
        if arguments.json:
            screen.show_json({"role": role, "keyid": key.keyid})
        else:
            print(f"{role} {short(key.keyid)}  ({key.keyid})")
        return 0
    draft = read_draft(path)
    if not arguments.json:
        print(screen.clean_lines(drafts.describe(draft)))
    _show_state(path, draft, as_json=arguments.json)
    return 0


def read_draft(path: Path) -> Draft:
    """Read a draft; raises InvalidValue that names the file."""
    try:
        with path.open("rb") as file:
            data = file.read(drafts.MAX_DRAFT_BYTES + 1)
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}", code="invalid.draft") from error
    try:
        return drafts.decode_draft(data)
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error.message}", code=error.code, hint=error.hint) from error


def write_new_draft(path: Path, draft: Draft, *, as_json: bool) -> None:
    """Write a draft where none is, and say what it holds and who has to sign; raises Conflict or StorageError."""
    require_new(path)
    _write(path, drafts.encode_draft(draft))
    screen.note("\n".join(drafts.describe(draft)))
    _show_state(path, draft, as_json=as_json)


def require_complete(draft: Draft, path: Path) -> None:
    """Raise TrustError that says whose signatures are missing."""
    lines = drafts.missing(drafts.quorums(draft))
    if lines:
        raise TrustError(
            "signatures are missing:\n" + "\n".join(lines),
            code="trust.threshold",
            hint=f"outrider-hub keys sign {path} --keys DIR, where one of these keys is",
        )


def require_new(path: Path) -> None:
    """Raise Conflict when there is a draft of this name already."""
    if path.exists():
        raise Conflict(f"{path} exists", code="conflict.exists", hint="name a new file; signatures may be in that one")


def parse_thresholds(texts: Iterable[str]) -> dict[str, int]:
    """`ROLE=N` as a mapping; raises InvalidValue."""
    found = {}
    for text in texts:
        role, _, number = text.partition("=")
        if not role or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 16:
            raise InvalidValue(
                f"--threshold {text[:80]!r} is not ROLE=N", code="invalid.threshold", hint="for example root=2"
            )
        found[role] = int(number)
    return found


def read_publics(names: Iterable[str]) -> list[tuple[str, Key]]:
    """Role and key of each public half that these files and directories hold; raises InvalidValue."""
    found: list[tuple[str, Key]] = []
    for name in names:
        path = Path(name)
        paths = sorted(path.glob(f"*{PUBLIC_SUFFIX}")) if path.is_dir() else [path]
        if not paths:
            raise InvalidValue(
                f"{path} holds no public half", code="invalid.public_key", hint=f"they end in {PUBLIC_SUFFIX}"
            )
        found += [read_public(item) for item in paths]
    return found


def _make_keys(arguments: argparse.Namespace) -> int:
    roles = [*arguments.role, *(ONLINE if arguments.online else ())]
    if not roles:
        raise _usage(f"which keys? --role {', --role '.join(OFFLINE)}, or --online for a new hub's")
    keyring = Keyring(Path(arguments.out))
    made = []
    for role in dict.fromkeys(roles):
        for _ in range(1 if role in ONLINE else arguments.count):
            path = keyring.free_path(role)
            signer = keyring.add(role)
            public = keyring.write_public(role, signer.public_key)
            made.append(MadeKey(role=role, keyid=signer.public_key.keyid, file=str(path), public=str(public)))
    if arguments.json:
        screen.show_json({"keys": made})
        return 0
    for key in made:
        print(f"made {key.role} key {short(key.keyid)}: {key.file}")
    screen.note(
        "\nWrite the identifiers down: they are what you compare when you sign. The .key files stay here; the\n"
        f"{PUBLIC_SUFFIX} files are carried to where the root is put together.\n\nnext, there:\n"
        "  outrider-hub keys init --draft root-1.json --public DIR --threshold root=2   # the first root\n"
        "  outrider-hub keys rotate ROLE --draft FILE --add PUB.json                    # an existing hub"
    )
    return 0


def _first_draft(arguments: argparse.Namespace) -> int:
    thresholds = parse_thresholds(arguments.threshold)
    by_role: dict[str, dict[str, Key]] = {}
    for role, key in read_publics(arguments.public):
        by_role.setdefault(role, {})[key.keyid] = key
    by_role.pop("release", None)  # families get their keys when they begin, or from `keys rotate models/FAMILY`
    unknown = sorted(set(thresholds) - set(by_role))
    if unknown:
        raise InvalidValue(f"--threshold {unknown[0]}: there is no key of that role", code="invalid.threshold")
    for role in dict.fromkeys((*ceremony.required_roles(), *ONLINE)):
        if role not in by_role:
            online = role in ONLINE
            raise InvalidValue(
                f"there is no public half of a {role} key",
                code="invalid.keys",
                hint=f"`outrider-hub keys init --out DIR {'--online' if online else f'--role {role}'}` makes one",
            )
    now_ms = SystemClock().wall_ms()
    keys = {
        role: RoleKeys(keys=tuple(held.values()), threshold=thresholds.get(role, 1)) for role, held in by_role.items()
    }
    root = ceremony.first_root(keys, now_ms=now_ms)
    targets = repository.new_targets(now_ms=now_ms)
    parts = {ROOT: repository.sign(root).decode(), TARGETS: repository.sign(targets).decode()}
    write_new_draft(Path(arguments.draft), Draft(parts=parts), as_json=arguments.json)
    return 0


def _require_known(draft: Draft, keyring: Keyring, signers: Sequence[Signer], *, is_sure: bool) -> None:
    """Raise TrustError when the draft builds on another root than this machine followed."""
    path = keyring.directory / TRUSTED_ROOT
    known = path.read_bytes() if path.exists() else None
    if not draft.basis:
        first = ceremony.read_draft_root(draft.parts[ROOT].encode())
        if known is not None and ceremony.read_draft_root(known).signed_bytes != first.signed_bytes:
            raise TrustError(
                f"these keys belong to a root already, and this draft begins another one ({path})",
                code="trust.root",
                hint="use other keys for another hub; if the earlier draft was given up, remove trusted-root.json",
            )
        return
    if draft.roots[-1:] != (draft.basis.get(ROOT),):
        raise InvalidValue("the draft's roots do not end in its basis", code="invalid.draft", hint="make it again")
    roots = [text.encode() for text in draft.roots]
    if known is None:
        known = _founded_here(roots, keyring, signers, is_sure=is_sure)
    drafts.follow(known, roots)


def _founded_here(roots: Sequence[bytes], keyring: Keyring, signers: Sequence[Signer], *, is_sure: bool) -> bytes:
    """The first root, if a key of this directory has signed it: keys of before the known root was kept beside them.

    Raises:
        TrustError: no key here has.
        Conflict: whoever was asked says that it is another hub's.
    """
    first = drafts.own_first(roots, [signer.public_key for signer in signers])
    if first is None:
        raise TrustError(
            f"without {TRUSTED_ROOT} in {keyring.directory}, nothing here tells this hub's root from a stranger's",
            code="trust.root",
            hint=f"take {TRUSTED_ROOT} over from a colleague who has signed for this hub",
        )
    digest = hashlib.sha256(first.signed_bytes).hexdigest()
    keyids = ", ".join(short(keyid) for keyid in first.signed.roles[ROOT].keyids)
    screen.note(
        f"there is no {TRUSTED_ROOT} in {keyring.directory}, but a key of it has signed the first root of this hub\n"
        f"  until {first.signed.expires:%Y-%m-%d}, root keys {keyids}\n  fingerprint {digest}"
    )
    if not is_sure:
        _ask("is that your hub's first root?")
    return first.to_bytes()


def _remember(draft: Draft, keyring: Keyring) -> None:
    """Keep what the next draft must follow from: the root that is published, or the first one that was just signed."""
    root = draft.basis.get(ROOT) or draft.parts[ROOT]
    _write(keyring.directory / TRUSTED_ROOT, root.encode())


def _show_state(path: Path, draft: Draft, *, as_json: bool) -> None:
    found = drafts.quorums(draft)
    if as_json:
        screen.show_json({"draft": str(path), "complete": not any(q.missing for q in found), "quorums": _plain(found)})
        return
    lines = drafts.missing(found)
    for line in lines:
        print(f"missing: {line}")
    if lines:
        screen.note(f"next: carry {path} to the holder of one of these keys: outrider-hub keys sign {path} --keys DIR")
    elif draft.basis:
        print("complete")
        screen.note(f"next, on the hub: outrider-hub keys publish {path}")
    else:
        print("complete")
        screen.note(f"next, where the hub shall be: outrider-hub init --root {path} --online DIR")


def _plain(found: Sequence[Quorum]) -> list[dict[str, object]]:
    return [{**msgspec.to_builtins(quorum), "missing": quorum.missing} for quorum in found]


def _ask(question: str) -> None:
    if not screen.can_ask():
        raise InvalidValue(
            "nobody is here to confirm the signature", code="usage.confirm", hint="look at it, or give --yes"
        )
    if not screen.confirm(question):
        raise Conflict("not signed", code="command.declined")


def _write(path: Path, data: bytes) -> None:
    try:
        files.replace(path, data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", hint="check its folder and space") from error


def _usage(message: str) -> InvalidValue:
    return InvalidValue(message, code="invalid.usage", hint="outrider-hub keys init --help")
