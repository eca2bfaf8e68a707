"""What `doctor` looks at, one function per concern; each returns findings and raises nothing for what it finds.

Certificates are looked into here with `cryptography`, which the daemon must not load.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from edge_agent.adapters.courier import broker_context
from edge_agent.adapters.lock import owner_pid
from edge_agent.adapters.tls import dated_context
from edge_agent.client import Client
from edge_agent.commands.status import time_words
from edge_agent.core.trusted_time import BUILT_MS, WRONG_CLOCK_MS
from edge_agent.identity import Identity, Refusal, check_hub_url, load_identity, load_refusal
from edge_agent.profiles import AUTO, misfits, resolve_profile, this_machine
from edge_agent.settings import AgentConfig
from shared.errors import OutriderError
from shared.limits import MIB
from shared.profile import DeviceProfile

CONNECT_S: Final = 5.0
MIN_KERNEL: Final = (4, 8)
LATE_SHARE: Final = 1 / 6
"""Of a life: it is renewed when a third is left, and a twelfth later at the latest."""
_DAY_MS: Final = 86_400_000
_DISTRIBUTIONS: Final = {"onnx": "onnxruntime", "litert": "ai-edge-litert"}

_UNSHARE: Final = """
import ctypes, sys
libc = ctypes.CDLL(None)
sys.exit(0 if libc.unshare(0x40000000) == 0 or libc.unshare(0x50000000) == 0 else 1)
"""
"""CLONE_NEWNET, by right or inside a user namespace of its own."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; `todo` says what to do where there is something to do."""

    check: str
    result: Literal["ok", "warn", "fail"]
    text: str
    todo: str = ""


def check_all(config: AgentConfig, *, wall_ms: int) -> list[Finding]:
    """All findings, in an order in which the earlier explain the later."""
    findings = [check_python(), check_kernel(), *check_state(config)]
    profile, found = check_profile(config)
    findings += [found, *check_runtimes(profile), check_confinement()]
    try:
        identity = load_identity(config.state_dir)
    except OutriderError as error:
        return [*findings, Finding(check="identity", result="fail", text=error.message, todo=error.hint)]
    found, now_ms = check_time(config, issued_ms=identity.not_before_ms, wall_ms=wall_ms)
    findings.append(found)
    findings.append(check_certificate(identity, now_ms=now_ms, refusal=load_refusal(config.state_dir)))
    findings.append(check_hub(identity, config, now_ms=now_ms))
    findings.append(check_broker(identity, config, now_ms=now_ms))
    return findings


def check_python() -> Finding:
    """The interpreter."""
    text = f"{platform.python_implementation()} {platform.python_version()}"
    return Finding(check="python", result="ok", text=text)


def check_kernel() -> Finding:
    """The operating system."""
    system, release = platform.system(), platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if system != "Linux":
        return Finding(check="kernel", result="fail", text=system, todo="the agent needs Linux")
    if numbers < MIN_KERNEL:
        return Finding(check="kernel", result="warn", text=f"Linux {release}", todo="update the system")
    return Finding(check="kernel", result="ok", text=f"Linux {release} on {platform.machine()}")


def check_state(config: AgentConfig) -> list[Finding]:
    """The state directory: there, ours, with room; and who runs on it."""
    folder = config.state_dir
    if not folder.is_dir():
        text = f"{folder} is not there"
        return [Finding(check="state", result="fail", text=text, todo=f"run `outrider-agent init --state {folder}`")]
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        todo = "run as its owner, or change its owner"
        return [Finding(check="state", result="fail", text=f"{folder} cannot be written", todo=todo)]
    findings = [Finding(check="state", result="ok", text=str(folder))]
    damaged = ", ".join(sorted(path.name for path in folder.glob("agent.db.corrupt-*[0-9]")))
    if damaged:
        todo = "keep it for an analysis or remove it; a second one means that the disk is failing"
        findings.append(Finding(check="state", result="warn", text=f"set aside as damaged: {damaged}", todo=todo))
    pid = owner_pid(folder)
    findings.append(Finding(check="agent", result="ok", text=f"runs as process {pid}" if pid else "does not run"))
    return findings


def check_profile(config: AgentConfig) -> tuple[DeviceProfile | None, Finding]:
    """The device profile and whether it fits this machine and its disk."""
    try:
        profile = resolve_profile(config.profile, enrolled=_enrolled_profile(config))
    except OutriderError as error:
        return None, Finding(check="profile", result="fail", text=error.message, todo=error.hint)
    reasons = misfits(profile, this_machine())
    wanted = profile.disk.models_bytes + profile.disk.queue_bytes
    try:
        info = os.statvfs(config.state_dir)
        free = info.f_bavail * info.f_frsize
        if free < wanted:
            reasons.append(f"may use {wanted // MIB} MiB of disk, {free // MIB} MiB are free")
    except OSError:
        pass  # the state directory's own finding says so
    if reasons:
        text = f"{profile.name} does not fit: {'; '.join(reasons)}"
        return profile, Finding(check="profile", result="warn", text=text, todo="choose another with --profile")
    return profile, Finding(check="profile", result="ok", text=f"{profile.name}: {profile.title}")


def _enrolled_profile(config: AgentConfig) -> str:
    try:
        return load_identity(config.state_dir).profile
    except OutriderError:
        return AUTO


def check_runtimes(profile: DeviceProfile | None) -> list[Finding]:
    """The engines that the profile names."""
    findings = []
    for runtime in profile.inference.runtimes if profile else tuple(_DISTRIBUTIONS):
        distribution = _DISTRIBUTIONS[runtime]
        try:
            version = importlib.metadata.version(distribution)
            findings.append(Finding(check=f"runtime {runtime}", result="ok", text=f"{distribution} {version}"))
        except importlib.metadata.PackageNotFoundError:
            extra = "agent" if runtime == "onnx" else runtime
            findings.append(
                Finding(
                    check=f"runtime {runtime}",
                    result="warn",
                    text=f"{distribution} is not installed",
                    todo=f"pip install 'outrider[{extra}]'",
                )
            )
    if findings and all(finding.result == "warn" for finding in findings):
        return [msgspec.structs.replace(finding, result="fail") for finding in findings]
    return findings


def check_confinement() -> Finding:
    """Whether model hosts can be started without network."""
    child = subprocess.run([sys.executable, "-I", "-S", "-c", _UNSHARE], capture_output=True, timeout=20, check=False)
    if child.returncode == 0:
        return Finding(check="confinement", result="ok", text="model hosts run without network")
    return Finding(
        check="confinement",
        result="warn",
        text="this kernel does not let an unprivileged process give up its network",
        todo="allow user namespaces (sysctl kernel.unprivileged_userns_clone=1), or accept hosts with network",
    )


def check_time(config: AgentConfig, *, issued_ms: int, wall_ms: int) -> tuple[Finding, int]:
    """What the time rests on, and the best guess at it: the running agent's, else the clock and what has passed."""
    wrong = "set this machine's clock, or leave it: the agent goes by the hub's time"
    try:
        with Client(config.door_path) as agent:
            state = agent.status()
    except OutriderError:
        floor_ms = max(BUILT_MS, issued_ms)
        if wall_ms < floor_ms:
            days = (floor_ms - wall_ms) // _DAY_MS
            text = f"the system clock is at least {days} days behind; the agent asks the hub when it runs"
            return Finding(check="time", result="warn", text=text, todo=wrong), floor_ms
        return Finding(
            check="time", result="ok", text="by the system clock; the agent asks the hub when it runs"
        ), wall_ms
    now_ms = state.time_ms or wall_ms
    text = time_words(state)
    if state.assignment_waits:
        todo = "let this device reach the hub; the assignment is taken by itself then"
        return Finding(check="time", result="fail", text=f"{text}; an assignment waits for it", todo=todo), now_ms
    if abs(state.clock_error_ms) >= WRONG_CLOCK_MS:
        return Finding(check="time", result="warn", text=text, todo=wrong), now_ms
    return Finding(check="time", result="ok", text=text), now_ms


def check_certificate(identity: Identity, *, now_ms: int, refusal: Refusal | None = None) -> Finding:
    """The device's certificate and key: they belong together, are private, and are renewed in time."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    again = "ask for a new join token and run `outrider-agent enroll --force TOKEN`"
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
        key = load_pem_private_key(identity.key_path.read_bytes(), password=None)
        belongs = key.public_key() == certificate.public_key()
    except (OSError, ValueError, TypeError) as error:
        return Finding(check="identity", result="fail", text=f"{identity.device}: {error}", todo=again)
    ends_ms = int(certificate.not_valid_after_utc.timestamp() * 1000)
    begins_ms = int(certificate.not_valid_before_utc.timestamp() * 1000)
    days = (ends_ms - now_ms) / _DAY_MS
    text = f"{identity.device} at {identity.hub_url}"
    if not belongs:
        return Finding(check="identity", result="fail", text=f"{text}: key and certificate differ", todo=again)
    if refusal is not None:
        todo = refusal.hint or again
        return Finding(check="identity", result="fail", text=f"{text}: not renewed: {refusal.message}", todo=todo)
    if begins_ms > now_ms:
        return Finding(check="identity", result="fail", text=f"{text}: not valid yet", todo="set this machine's clock")
    if days <= 0:
        todo = "start the agent: it renews what has expired when it reaches the hub; if it does not, enrol again"
        return Finding(check="identity", result="warn", text=f"{text}: expired {-days:.1f} days ago", todo=todo)
    if identity.key_path.stat().st_mode & 0o077:
        todo = f"chmod 600 {identity.key_path}"
        return Finding(check="identity", result="warn", text=f"{text}: others may read the key", todo=todo)
    left = (ends_ms - now_ms) / (ends_ms - begins_ms)
    if left < LATE_SHARE:
        todo = "it should have been renewed by now: check that the agent runs and reaches the hub"
        return Finding(check="identity", result="warn", text=f"{text}: expires in {days:.1f} days", todo=todo)
    due = max((left - 1 / 3) * (ends_ms - begins_ms) / _DAY_MS, 0)
    text += f": certificate valid for {days:.0f} days, to be renewed in {due:.0f}"
    return Finding(check="identity", result="ok", text=text)


def check_hub(identity: Identity, config: AgentConfig, *, now_ms: int) -> Finding:
    """Whether the hub answers over TLS with a certificate of its CA, and takes ours."""
    url = config.hub.url or identity.hub_url

    def probe() -> None:
        host, port = check_hub_url(url)
        context = dated_context(
            identity.ca_path,
            now_ms=lambda: now_ms,
            certificate_path=identity.certificate_path,
            key_path=identity.key_path,
        )
        with _tls(host, port, context) as link:
            link.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            if not link.recv(16).startswith(b"HTTP/1."):
                raise ConnectionError("it does not speak HTTP")

    return _probed("hub", url, probe, todo="check that `outrider-hub serve` runs and can be reached from here")


def check_broker(identity: Identity, config: AgentConfig, *, now_ms: int) -> Finding:
    """Whether the broker answers over TLS 1.3 with a certificate of the hub's CA."""
    host, port = config.broker.host or identity.broker_host, config.broker.port or identity.broker_port

    def probe() -> None:
        context = broker_context(
            ca_path=identity.ca_path,
            certificate_path=identity.certificate_path,
            key_path=identity.key_path,
            now_ms=lambda: now_ms,
        )
        with _tls(host, port, context):
            return

    return _probed("broker", f"{host}:{port}", probe, todo="check that the hub's broker runs and the port is open")


def _tls(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((host, port), timeout=CONNECT_S)
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _probed(check: str, where: str, probe: Callable[[], None], *, todo: str) -> Finding:
    try:
        probe()
    except OutriderError as error:
        return Finding(check=check, result="fail", text=f"{where}: {error.message}", todo=error.hint or todo)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        known = "the certificates do not agree: check the clock, or enrol again if the hub was set up anew"
        if "REVOKED" in reason:
            known = (
                "the hub has revoked this device: ask its operator for a token, then `outrider-agent enroll --force`"
            )
        return Finding(check=check, result="fail", text=f"{where}: {reason}", todo=known)
    except OSError as error:
        return Finding(check=check, result="fail", text=f"{where}: {error.strerror or error}", todo=todo)
    return Finding(check=check, result="ok", text=where)
