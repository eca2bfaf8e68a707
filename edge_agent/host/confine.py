"""What a model host gives up before it looks at a model, so that a hostile one finds little to take.

Two steps, because libraries are imported between them: `bind_to_parent` first, `give_up_rights` when everything that
comes from disk is loaded. All of it works for an ordinary user; where a kernel refuses, the host goes on with what it
got, and says whether it still has the network.

References: prctl(2), capabilities(7), user_namespaces(7), network_namespaces(7), proc(5) for oom_score_adj.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CAPABILITY_VERSION_3: Final = 0x20080522
_OOM_SCORE: Final = "500"
"""The kernel shall end a model host before the daemon that can start another one (range -1000 to 1000)."""


def bind_to_parent(parent: int) -> None:
    """Die with the core; raises SystemExit when it is gone already.

    The terminal's and the service manager's signals go to every process of the group: they are ignored here, because
    the core decides when a host ends, and a host that vanished by itself would count as a crash.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def give_up_rights(*, parent: int, niceness: int) -> bool:
    """Give up core dumps, the network and every capability; returns whether the network is still there."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if niceness > 0:
        os.nice(niceness)
    _write("/proc/self/oom_score_adj", _OOM_SCORE)
    user, group = os.getuid(), os.getgid()
    # With CAP_SYS_ADMIN a network namespace needs no user namespace, which would hide other users' files from root.
    network = int(libc.unshare(_CLONE_NEWNET)) != 0
    if network and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        network = False
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    # A change of credentials clears the parent-death signal (prctl(2)), so it is set again.
    bind_to_parent(parent)
    return network


def return_free_memory() -> None:
    """Give the kernel back what loading has freed (malloc_trim(3)), where the C library has that call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def rss_bytes() -> int:
    """This process's resident size."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError:
        return  # a container may forbid it; what it would have given is then missing, and nothing else
