"""ONNX Runtime for the hub's processes and the operator's command: the one place that imports it.

Its wheels send usage data home, and keep a device id and a database of it below the home directory, unless told not
to before the import. On the machine that holds the offline keys, and everywhere else, nothing is sent home.
"""

from __future__ import annotations

import os
from typing import Any


def onnxruntime() -> Any:
    """The library, silent; raises ImportError where it is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251  # the library reads it from there and nowhere else
    import onnxruntime as library

    return library
