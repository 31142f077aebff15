"""A change that is made as a whole or not at all.

Each step says, when it has been made, how it is undone, and what is still to be done once nothing can
fail any more.  The steps of a failing change are undone in reverse order.  Requests that must not see the
graph in between are held off by drained sections, which end with the change.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any

_LOG = logging.getLogger(__name__)

#: A step backwards, or a last one forwards.
Step = Callable[..., Awaitable[None] | None]


class Change:
    """Use it as ``async with Change() as change``: an exception undoes what has been done."""

    def __init__(self) -> None:
        self._undo: list[tuple[Step, tuple[Any, ...]]] = []
        self._finish: list[tuple[Step, tuple[Any, ...]]] = []
        self._sections = AsyncExitStack()

    def on_failure(self, step: Step, *arguments: Any) -> None:
        """Call this if a later step fails; the last one that was registered comes first."""
        self._undo.append((step, arguments))

    def on_success(self, step: Step, *arguments: Any) -> None:
        """Call this when all steps have been made; it can't make the change fail any more."""
        self._finish.append((step, arguments))

    async def hold(self, section: AbstractAsyncContextManager[None]) -> None:
        """Enter a drained section that ends with the change."""
        await self._sections.enter_async_context(section)

    async def __aenter__(self) -> Change:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            steps = self._finish if error is None else reversed(self._undo)
            for step, arguments in steps:
                try:
                    result = step(*arguments)
                    if result is not None:
                        await result
                except Exception:
                    _LOG.exception("a change of the block graph could not be ended in good order")
        finally:
            await self._sections.aclose()
