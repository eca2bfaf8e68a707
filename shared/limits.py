"""Every bound on what comes from outside, in one place, with its unit in its name.

A bound here is a promise to memory and disk, not a policy: what an operator may want to change is configuration.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Wire
MAX_MQTT_PACKET_BYTES: Final = 256 * KIB
"""The broker refuses more and would cut the connection, so nothing larger is ever handed to it."""
MAX_BATCH_BYTES: Final = 192 * KIB
MAX_BATCH_RECORDS: Final = 500
MAX_RECORD_BYTES: Final = 32 * KIB
MAX_ENVELOPE_ID_CHARS: Final = 64

# The door (frames on the local socket, and between the core and a model host)
MAX_FRAME_HEADER_BYTES: Final = 64 * KIB
MAX_FRAME_PAYLOAD_BYTES: Final = 64 * MIB
MAX_TENSORS: Final = 64
MAX_TENSOR_RANK: Final = 8
MAX_DOOR_CONNECTIONS: Final = 64
MAX_WAITING_REQUESTS: Final = 256
MAX_REQUEST_ID_CHARS: Final = 128
"""A request's id is kept for its feedback and goes into records, so it is a name and not a document."""
MAX_REQUEST_DEADLINE_MS: Final = 3_600_000
"""Who gives more time gets an hour: timers and other programs do not take every number."""

# Metadata (TUF) and releases
MAX_ROOT_BYTES: Final = 512 * KIB
MAX_ROOT_ROTATIONS: Final = 256
MAX_TIMESTAMP_BYTES: Final = 16 * KIB
MAX_SNAPSHOT_BYTES: Final = 2 * MIB
MAX_TARGETS_BYTES: Final = 5 * MIB
MAX_ASSIGNMENT_BYTES: Final = 2 * KIB
"""One small message for each device, however large the fleet; patches are left out of it first."""
MAX_MANIFEST_BYTES: Final = 256 * KIB
MAX_JSON_DEPTH: Final = 32
MAX_MODELS_PER_DEVICE: Final = 8
"""As many as fit into an assignment under names of usual length; long names meet its size first."""
MAX_PATCHES_PER_ASSIGNMENT: Final = 8
MAX_ROOTS_WITH_TIME: Final = 8
MAX_TIME_ROOTS_BYTES: Final = 256 * KIB
"""Roots that come along with an attested time; one comes whatever its size."""
MAX_TIME_ANSWER_BYTES: Final = 1 * MIB

# Models
MAX_MODEL_BYTES: Final = 512 * MIB
MAX_GOLDEN_BYTES: Final = 32 * MIB
MAX_GOLDEN_SAMPLES: Final = 4096
MAX_LABELS: Final = 10_000
"""Of one model. They have to fit into the manifest beside all else, so long ones meet MAX_MANIFEST_BYTES first."""
MAX_GRAPH_NODES: Final = 100_000
MAX_GRAPH_DEPTH: Final = 8

# Federated rounds
MAX_ROUND_MESSAGE_BYTES: Final = 32 * MIB
"""A task or its reply; what does not fit into a packet travels over HTTPS."""
MAX_ROUND_ITEMS: Final = 4096
MAX_ROUND_LIST: Final = 100_000
MAX_ROUND_FIELDS: Final = 250_000
"""Fields and whole numbers of lists of one message together, as often as they are looked at: a fifth of a second."""
MAX_ROUND_SAMPLES: Final = 2_000
"""Of one family on one device. Averages are weighted by them, so a device that claims more is refused."""

# Questions to the hub's larger model
MAX_ESCALATED_BYTES: Final = 4 * MIB
"""Elements of one question; it is held until its answer came or was given up, after the application has its own."""
MAX_CLOUD_ANSWER_BYTES: Final = 4 * MIB

# REST
MAX_JSON_BODY_BYTES: Final = 1 * MIB
MAX_CSR_BYTES: Final = 8 * KIB
MAX_PAGE_ITEMS: Final = 500
