"""Patches from one model file to another, aligned to tensors (docs/patches.md).

    format.py        what a patch's bytes mean, and every bound on them
    applying.py      `apply`: the result, window by window, in bounded memory; this runs on devices, on hostile input
    making.py        `make`: the patch; this runs on the hub
    alignment.py     which bytes of the old file belong to which bytes of the new one

Pure: callers give functions that read and write. Beside shared/tensors.py the only place of `shared` that loads numpy,
and only in children: the arithmetic of both ends must be the same, and bytes are slow in anything else.
"""
