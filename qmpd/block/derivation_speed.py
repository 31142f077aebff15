"""How fast keys are derived on this machine: measured when somebody asks, and remembered for a while."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Final

#: Seconds after which a measurement is made anew: machines become slower and faster.
_REMEMBERED: Final = 600.0


class DerivationSpeed:
    """Speeds by whatever they depend on, such as the hash and the key's length."""

    def __init__(self) -> None:
        #: When it was measured, by the monotonic clock, and the speed.
        self._measured: dict[Hashable, tuple[float, float]] = {}

    async def of(self, what: Hashable, measure: Callable[[], Awaitable[float]]) -> float:
        """The speed of `what`; `measure` finds it out if it is not known or was measured long ago."""
        when, speed = self._measured.get(what, (0.0, 0.0))
        if what not in self._measured or time.monotonic() - when > _REMEMBERED:
            speed = await measure()
            self._measured[what] = time.monotonic(), speed
        return speed
