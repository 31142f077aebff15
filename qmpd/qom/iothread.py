"""I/O threads.

qmpd does its I/O in one loop with a pool of threads beside it, so that an
iothread is a name with numbers: clients that make one and refer to it work.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable

_MAX: Final = (1 << 63) - 1
_POOL_MAX: Final = (1 << 31) - 1

#: The properties and what they are unless told otherwise.
_DEFAULTS: Final[Mapping[str, int]] = {
    "poll-max-ns": 32768,
    "poll-grow": 0,
    "poll-shrink": 0,
    "aio-max-batch": 0,
    "thread-pool-min": 0,
    "thread-pool-max": 64,
}


class IOThread(UserCreatable):
    """The object type "iothread"."""

    qom_type = "iothread"
    struct = "IothreadProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._values = dict(_DEFAULTS)
        for name in _DEFAULTS.keys() & options.keys():
            _check_range(name, options[name])
            self._values[name] = options[name]
        _check_pool(self._values)

    def get(self, name: str) -> Any:
        """The number."""
        return self._values[name]

    def info(self) -> dict[str, int]:
        """What `query-iothreads` says of it, with the thread of the loop, in which it is called."""
        shown = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")
        return {"thread-id": threading.get_native_id(), **{name: self._values[name] for name in shown}}

    def set(self, name: str, value: Any) -> None:
        """Take another number.

        :raise Error: if it is negative, or the thread pool's limits contradict each other.
        """
        _check_range(name, value)
        values = self._values | {name: value}
        _check_pool(values)
        self._values = values


def _check_range(name: str, value: int) -> None:
    if not 0 <= value <= _MAX:
        raise Error(f"{name} value must be in range [0, {_MAX}]")


def _check_pool(values: Mapping[str, int]) -> None:
    smallest, largest = values["thread-pool-min"], values["thread-pool-max"]
    if largest == 0 or smallest > largest or largest > _POOL_MAX:
        raise Error("bad thread-pool-min/thread-pool-max values")
