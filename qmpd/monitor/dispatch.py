"""From a message to its reply: admit, validate, call the handler, answer.

A handler is a plain function or an `async def`, called with the arguments.  Plain
functions run at once.  Calling an `async def` only makes a coroutine object of
which nothing has run, so there is nothing to decide in advance: whatever can be
awaited is handed back as :class:`Unfinished`, and the connection awaits it in a
task.  (Starting it here with `send(None)`, to save the task where it does not
wait, would be faster, but `asyncio.current_task()` and `asyncio.timeout()` would
fail up to the first wait, and find another task after it.)

A refusal (:class:`qmpd.errors.Error`) is told to the client.  Anything else that
a handler raises is a fault of ours: logged, answered as GenericError, and the
daemon lives on.  Neither the log nor the reply quotes the exception's text or the
arguments, because they may hold a passphrase.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, NamedTuple

from qmpd.errors import Error, trace
from qmpd.monitor.encode import failure, success
from qmpd.monitor.session import NEGOTIATION, Call, Schema, Session

_logger = logging.getLogger(__name__)

#: Arguments in QAPI's names to a plain JSON value.  Some are given the client's descriptors as well.
Handler = Callable[..., Any | Awaitable[Any]]


class Reply(NamedTuple):
    """A reply to be sent.

    :param message: the members on the wire, in order.
    :param may_have_doubles: see :func:`qmpd.monitor.encode.encode`.
    """

    message: dict[str, Any]
    may_have_doubles: bool


class Unfinished(NamedTuple):
    """A command whose handler is to be awaited: not begun yet."""

    call: Call
    message: Mapping[str, Any]
    awaitable: Awaitable[Any]


class Dispatcher:
    """All the commands of a daemon, for any number of sessions.

    :param schema: says which commands there are and what they take.
    :param handlers: one for each command, except `qmp_capabilities`, which is the session's.
    :param given_up: the commands that are cancelled when their client goes away.
    :param with_descriptors: the commands whose handlers are called with the client's descriptors
        (:class:`ClientDescriptors`) after the arguments.
    :raise ValueError: if a command has no handler, or a handler no command.
    """

    def __init__(
        self,
        schema: Schema,
        handlers: Mapping[str, Handler],
        given_up: Collection[str] = (),
        with_descriptors: Collection[str] = (),
    ) -> None:
        commands = schema.commands.keys() - {NEGOTIATION}
        without = sorted(commands - handlers.keys())
        unknown = sorted(handlers.keys() - commands - {NEGOTIATION})
        if without or unknown:
            raise ValueError(f"commands without a handler: {without}, handlers without a command: {unknown}")
        self.schema = schema
        self.given_up = frozenset(given_up)
        self._with_descriptors = frozenset(with_descriptors)
        self._handlers = dict(handlers)

    def begin(self, session: Session, message: Any) -> Reply | Unfinished | None:
        """Execute a message of a session.

        :param message: what :meth:`Session.receive` returned.
        :return: the reply, None if the command is one that does not answer, or what is to be
            given to :meth:`finish` within a task.
        """
        name = None
        try:
            call = session.admit(message)
            name = call.name
            call.command.validate(call.arguments)
            if name == NEGOTIATION:
                session.negotiate(call.arguments.get("enable", ()))
                value: Any = {}
            else:
                handler = self._handlers[name]
                if name in self._with_descriptors:
                    value = handler(call.arguments, session.descriptors)
                else:
                    value = handler(call.arguments)
                if type(value) is not dict and inspect.isawaitable(value):
                    return Unfinished(call, message, value)
        except Exception as error:
            return _refused(error, name, message)
        return _done(call, value, message)

    async def finish(self, unfinished: Unfinished) -> Reply | None:
        """Await the rest of a command; raises nothing but cancellation."""
        call, message, awaitable = unfinished
        try:
            value = await awaitable
        except Exception as error:
            return _refused(error, call.name, message)
        return _done(call, value, message)


def _done(call: Call, value: Any, message: Mapping[str, Any]) -> Reply | None:
    command = call.command
    if not command.success_response:
        return None
    reply = success(value, message)
    return Reply(reply, command.returns_number or type(reply.get("id", "")) not in (str, int))


def _refused(error: Exception, name: str | None, message: Any) -> Reply:
    request = message if type(message) is dict else {}
    if isinstance(error, Error):
        return Reply(failure(error.error_class, error.desc, request), True)
    kind = type(error).__qualname__
    _logger.error(
        "command %s failed unexpectedly; the error's text is left out, it may quote a secret\n%s",
        name,
        trace(error),
    )
    desc = f"Internal error in command '{name}': {kind} (the daemon's log says more)"
    return Reply(failure(Error.error_class, desc, request), True)
