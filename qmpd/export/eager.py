"""Coroutines that mostly don't have to wait, without a task for each.

A request that the page cache can answer never waits, and a task for it would
cost more than the request.  So :func:`begin` runs a coroutine until it wants
to wait, there and then; only if it does is the rest put into a task.  (From
Python 3.12 on asyncio has this as `eager_start`.)

Until it first waits the coroutine must not use what needs the current task
(timeouts, task groups); awaiting futures, locks and threads is all right.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any


def begin(coroutine: Coroutine[Any, Any, None], keep: Callable[[asyncio.Task[None]], None]) -> bool:
    """Run `coroutine` until it waits or ends.

    :param keep: is given the task of the rest, and has to hold on to it.
    :returns: whether it has ended.
    :raise BaseException: what the coroutine raised before it waited.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return True
    keep(asyncio.get_running_loop().create_task(_finish(coroutine, awaited)))
    return False


@types.coroutine
def _finish(coroutine: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Wait for what `coroutine` waits for already, then go on with it."""
    while True:
        failure: BaseException | None = None
        try:
            # The task takes the future as if `coroutine` had handed it over just now.
            yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            failure = error
        if failure is None:
            # This sends None, which is what a task resumes its coroutine with.
            yield from coroutine.__await__()
            return
        try:
            awaited = coroutine.throw(failure)
        except StopIteration:
            return
