"""One client's conversation, without I/O: bytes in, requests and refusals out.

A session begins with the greeting and is *negotiating* until `qmp_capabilities`
was done; then it is *ready*.  What each state allows is the table
:data:`STATES`.  The shape of a request is checked when it has arrived, whether
its command may run when its turn comes, because a command in front of it may be
the one that ends the negotiation.  The order of the checks is QEMU's, for a
client sees it in which error it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, Protocol

from qmpd.errors import CommandNotFound, Error
from qmpd.monitor import encode
from qmpd.monitor.json_stream import JSONError, JSONStream

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

    :param only: the one command that can be executed, or None for all of them.
    :param never: a command that can't be.
    :param refusal: what is said otherwise.
    :param events: whether events are sent.
    """

    only: str | None
    never: str | None
    refusal: str
    events: bool


STATES: Final = {
    State.NEGOTIATING: _Rule(
        only=NEGOTIATION,
        never=None,
        refusal=f"Expecting capabilities negotiation with '{NEGOTIATION}'",
        events=False,
    ),
    State.READY: _Rule(
        only=None,
        never=NEGOTIATION,
        refusal="Capabilities negotiation is already complete, command ignored",
        events=True,
    ),
}


class Request(NamedTuple):
    """A request of the right shape.

    :param name: the command.
    :param arguments: empty if there are none.
    :param oob: whether it came as `exec-oob`.
    :param message: the request as it came, for its id.
    """

    name: str
    arguments: dict[str, Any]
    oob: bool
    message: Mapping[str, Any]


class Refusal(NamedTuple):
    """Something that is no request, and the reply to it."""

    reply: dict[str, Any]


_MEMBERS: Final = frozenset({"execute", "arguments", "id"})
_MEMBERS_WITH_OOB: Final = _MEMBERS | {"exec-oob"}
_NO_ID: Final[Mapping[str, Any]] = {}


class Session:
    """The protocol side of one client.

    :param schema: the commands there are.
    :param version: the greeting's member `version`, as `query-version` returns it.
    """

    def __init__(self, schema: Schema, version: Mapping[str, Any]) -> None:
        self._commands = schema.commands
        self._version = version
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

    def receive(self, data: bytes) -> list[Request | Refusal]:
        """Take what the client sent.

        :return: the requests that are complete by now and the refusals of what was none, in order.
        """
        return [self._request(value) for value in self._stream.feed(data)]

    def _request(self, message: Any) -> Request | Refusal:
        if type(message) is not dict:
            # An error of the stream stands for itself.
            desc = message.desc if isinstance(message, JSONError) else "QMP input must be a JSON object"
            return Refusal(encode.failure(Error.error_class, desc, _NO_ID))
        try:
            return self._shaped(message)
        except Error as error:
            return Refusal(encode.failure(error.error_class, error.desc, message))

    def _shaped(self, message: dict[str, Any]) -> Request:
        # The usual case, before anything is looked at closely.
        if message.keys() <= _MEMBERS:
            name = message.get("execute")
            arguments = message.get("arguments", _NO_ID)
            if type(name) is str and (arguments is _NO_ID or type(arguments) is dict):
                return Request(name, arguments or {}, False, message)
        return Request(*_checked(message), message)

    def admit(self, request: Request) -> Command:
        """Decide whether a command may run now that its turn has come.

        :return: its entry in the schema.
        :raise Error: if the session's state forbids it, it does not exist, or it can't run out of band.
        """
        rule = STATES[self.state]
        name = request.name
        if request.oob and not self.oob:
            raise Error("QMP input member 'exec-oob' is unexpected")
        if rule.only is not None and name != rule.only:
            raise CommandNotFound(rule.refusal)
        command = self._commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if request.oob and not command.allow_oob:
            raise Error(f"The command {name} does not support OOB")
        if name == rule.never:
            raise CommandNotFound(rule.refusal)
        return command

    def negotiate(self, enable: Sequence[str] = ()) -> None:
        """Do `qmp_capabilities`, whose arguments are valid.

        :param enable: the capabilities that the client wants.
        :raise Error: for one that the greeting did not offer.
        """
        missing = [capability for capability in enable if capability not in CAPABILITIES]
        if missing:
            raise Error(f"Capability {missing[0]} not available")
        self.oob = "oob" in enable
        self.state = State.READY


def _checked(message: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """A request's command, arguments and whether it is out of band.

    :raise Error: naming the member that is not as it should be.  A request with more than one
        fault gets another of its errors from QEMU in some cases: there it is the first that a hash
        table gives.
    """
    for member in message:
        if member not in _MEMBERS_WITH_OOB:
            raise Error(f"QMP input member '{member}' is unexpected")
    for member in ("exec-oob", "execute"):
        if member in message and not isinstance(message[member], str):
            raise Error(f"QMP input member '{member}' must be a string")
    oob = "exec-oob" in message
    if oob and "execute" in message:
        raise Error("QMP input member 'execute' clashes with 'exec-oob'")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, dict):
        raise Error("QMP input member 'arguments' must be an object")
    if not oob and "execute" not in message:
        raise Error("QMP input lacks member 'execute'")
    return message["exec-oob" if oob else "execute"], arguments, oob
