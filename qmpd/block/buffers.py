"""Memory for what requests carry."""

from __future__ import annotations

import numpy as np


def unset(length: int) -> memoryview:
    """Memory of `length` bytes that hold anything: to be written all over before it is read.

    A bytearray is set to zeroes first, which takes as long as copying the data into it.
    """
    return np.empty(length, np.uint8).data
