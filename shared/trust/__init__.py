"""Release metadata and assignments: accept or refuse, decided from bytes.

TUF metadata objects, canonical JSON and signature checks are python-tuf's and securesystemslib's; the strict parser
before them, the client workflow and the assignment are ours. Rules: no file, no socket, no clock of its own; every
refusal is a TrustError that names the attack; unknown fields survive.

The agent's core never imports this package: its verifier child does, and speaks shared/wire/verification.py with it.
"""
