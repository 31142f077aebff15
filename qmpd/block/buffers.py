"""Memory for what requests carry."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np


def unset(length: int) -> memoryview:
    """Memory of `length` bytes that hold anything: to be written all over before it is read.

    A bytearray is set to zeroes first, which takes as long as copying the data into it.
    """
    return np.empty(length, np.uint8).data


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """Memory that can be referred to weakly, to hear of the end of its use."""


def lend(memory: memoryview, give_back: Callable[[], object]) -> memoryview:
    """The same memory, with word of when nobody holds what is returned, or a part of it, any more.

    :param give_back: called then, in whatever thread.
    """
    array = np.frombuffer(memory, np.uint8).view(_Lent)
    weakref.finalize(array, give_back).atexit = False
    return array.data
