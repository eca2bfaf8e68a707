"""Release metadata and assignments: accept or refuse, decided from bytes.

TUF metadata objects, canonical JSON and signature checks are python-tuf's and securesystemslib's; the strict parser
before them, the client workflow and the assignment are ours. Rules: no file, no socket, no clock of its own; every
refusal is a TrustError that names the attack; unknown fields survive.

`steps` and `roles` and `installed` may be imported by the agent's core: they load neither tuf nor cryptography.
"""
