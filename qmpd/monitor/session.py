"""One client's conversation, without I/O: bytes in, calls and refusals out.

A session begins with the greeting and is *negotiating* until `qmp_capabilities`
was done; then it is *ready*.  What each state allows is the table
:data:`STATES`.  A message is looked at when its turn comes, not when it
arrives, because a command in front of it may be the one that ends the
negotiation or enables a capability.  The order of the checks is QEMU's, for a
client sees it in which error it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, Protocol

from qmpd.descriptors import ClientDescriptors
from qmpd.errors import CommandNotFound, Error
from qmpd.qjson import JSONError, JSONStream

#: What the greeting offers and `qmp_capabilities` may enable.
CAPABILITIES: Final = ("oob",)

#: The command that belongs to the session, not to a handler.
NEGOTIATION: Final = "qmp_capabilities"


class Command(Protocol):
    """What is asked of a command's entry in the schema."""

    @property
    def allow_oob(self) -> bool:
        """Whether it may be executed out of band."""

    @property
    def success_response(self) -> bool:
        """Whether success is answered at all."""

    @property
    def returns_number(self) -> bool:
        """Whether there can be a double in what it returns."""

    def validate(self, arguments: dict[str, Any], /) -> None:
        """Check the arguments.

        :raise Error: in QMP's words.
        """


class Schema(Protocol):
    """What is asked of the schema."""

    @property
    def commands(self) -> Mapping[str, Command]:
        """All the commands there are, by name."""


class State(Enum):
    """How far a session has come."""

    NEGOTIATING = auto()
    READY = auto()


class _Rule(NamedTuple):
    """What a state allows.

    :param only: the one command that is looked at, or None for all of them.
    :param negotiates: whether `qmp_capabilities` does its work.
    :param refusal: what is said otherwise.
    :param events: whether events are sent.
    """

    only: str | None
    negotiates: bool
    refusal: str
    events: bool


STATES: Final = {
    State.NEGOTIATING: _Rule(
        only=NEGOTIATION,
        negotiates=True,
        refusal=f"Expecting capabilities negotiation with '{NEGOTIATION}'",
        events=False,
    ),
    State.READY: _Rule(
        only=None,
        negotiates=False,
        refusal="Capabilities negotiation is already complete, command ignored",
        events=True,
    ),
}


class Call(NamedTuple):
    """A request that may be executed.

    :param name: the command.
    :param command: its entry in the schema.
    :param arguments: empty if there are none; not validated yet.
    """

    name: str
    command: Command
    arguments: dict[str, Any]


_MEMBERS: Final = frozenset({"execute", "arguments", "id"})
_MEMBERS_WITH_OOB: Final = _MEMBERS | {"exec-oob"}


class Session:
    """The protocol side of one client.

    :param schema: the commands there are.
    :param version: the greeting's member `version`, as `query-version` returns it.
    :param descriptors: what commands may want to know of the client; by default that it passes none.
    """

    def __init__(
        self, schema: Schema, version: Mapping[str, Any], descriptors: ClientDescriptors | None = None
    ) -> None:
        self._commands = schema.commands
        self._version = version
        self.descriptors = descriptors or ClientDescriptors()
        self._stream = JSONStream()
        self.state = State.NEGOTIATING
        #: Whether the client has enabled out-of-band execution.
        self.oob = False

    @property
    def wants_events(self) -> bool:
        """Whether events are sent to this client by now."""
        return STATES[self.state].events

    def greeting(self) -> dict[str, Any]:
        """What the client is told before it has said a word."""
        return {"QMP": {"version": self._version, "capabilities": list(CAPABILITIES)}}

    def receive(self, data: bytes) -> list[Any]:
        """Take what the client sent.

        :return: the messages that are complete by now, in order, to be given to :meth:`admit` when
            their turn comes.
        """
        return self._stream.feed(data)

    def goes_first(self, message: Any) -> bool:
        """Whether a message that has just come is not to wait for those before it."""
        return self.oob and type(message) is dict and "exec-oob" in message and "execute" not in message

    def admit(self, message: Any) -> Call:
        """Decide whether a message is a request whose command may run now.

        :raise Error: if the message is an error of the stream or no proper request, if the session's
            state forbids the command, it does not exist, or it can't run out of band.
        """
        if type(message) is not dict:
            raise message if isinstance(message, JSONError) else Error("QMP input must be a JSON object")
        name, arguments, oob = _shape(message, _MEMBERS_WITH_OOB if self.oob else _MEMBERS)
        rule = STATES[self.state]
        if rule.only is not None and name != rule.only:
            raise CommandNotFound(rule.refusal)
        command = self._commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if oob and not command.allow_oob:
            raise Error(f"The command {name} does not support OOB")
        return Call(name, command, arguments)

    def negotiate(self, enable: Sequence[str] = ()) -> None:
        """Do `qmp_capabilities`, whose arguments are valid.

        :param enable: the capabilities that the client wants.
        :raise Error: for one that the greeting did not offer, or if the session is past that.
        """
        rule = STATES[self.state]
        if not rule.negotiates:
            raise CommandNotFound(rule.refusal)
        missing = [capability for capability in enable if capability not in CAPABILITIES]
        if missing:
            raise Error(f"Capability {missing[0]} not available")
        self.oob = "oob" in enable
        self.state = State.READY


def _shape(message: dict[str, Any], members: frozenset[str]) -> tuple[str, dict[str, Any], bool]:
    """A request's command, its arguments and whether it is to be executed out of band.

    :param members: those that may be there.
    :raise Error: naming the member that is not as it should be.  For a request with more than one
        fault QEMU names another of them in some cases: there it is the first that a hash table gives.
    """
    if not message.keys() <= members:
        unexpected = next(member for member in message if member not in members)
        raise Error(f"QMP input member '{unexpected}' is unexpected")
    for member in ("exec-oob", "execute"):
        if not isinstance(message.get(member, ""), str):
            raise Error(f"QMP input member '{member}' must be a string")
    oob = "exec-oob" in message
    if oob and "execute" in message:
        raise Error("QMP input member 'execute' clashes with 'exec-oob'")
    arguments = message.get("arguments")
    if arguments is None and "arguments" not in message:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Error("QMP input member 'arguments' must be an object")
    if not oob and "execute" not in message:
        raise Error("QMP input lacks member 'execute'")
    return message["exec-oob" if oob else "execute"], arguments, oob
