"""Option haggling: from the greeting to the transmission phase.

Sources: proto.md, sections "Handshake", "TLS support", "Metadata querying",
"Option types" and "Option reply types".

A :class:`Handshake` takes the client's bytes and says what to answer; it does
no I/O.  It is always in one :class:`State`, and :data:`_STEPS` says for each
how many bytes it waits for and what becomes of them.  What a client may ask is
the table :data:`_OPTIONS`.  An option that is refused gets an error reply and
the haggling goes on; whoever breaks the protocol itself is disconnected.

The bytes of an option are kept only until it is complete, and never more than
:data:`MAX_OPTION` of them.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qmpd.export.nbd import wire

#: Bytes of an option that are kept.  A longer one is passed over and answered ERR_TOO_BIG.
MAX_OPTION: Final = 64 << 10

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


@dataclass(frozen=True)
class Offer:
    """An export as a client hears of it.

    :param size: in bytes.
    :param flags: the transmission flags, without SEND_DF, which depends on the client.
    :param minimum_block: bytes; requests that are a multiple of it spare a read-modify-write.
    :param contexts: the metadata contexts that it has, in the order of their ids.
    """

    name: str
    description: str | None
    size: int
    flags: int
    minimum_block: int
    contexts: tuple[str, ...] = ("base:allocation",)


@dataclass(frozen=True)
class Agreement:
    """What a completed handshake has settled.

    :param contexts: the metadata contexts that the client wants, as their numbers in the offer.
    """

    export: str
    structured: bool
    extended: bool
    contexts: tuple[int, ...]


class State(enum.Enum):
    """How far the haggling is."""

    #: The client's flags are to come.
    FLAGS = enum.auto()
    #: An option's header is to come.
    OPTION = enum.auto()
    #: What belongs to the option is to come.
    PAYLOAD = enum.auto()
    #: What belongs to an option is to come, and is not wanted.
    SKIP = enum.auto()
    #: TLS is to be started; then `secured` is to be called.
    TLS = enum.auto()
    #: Done: there is an `agreement`.
    TRANSMISSION = enum.auto()
    #: The connection is to be closed once the answer is sent.
    CLOSED = enum.auto()


class Disconnect(Exception):
    """The client broke the protocol in a way that has no answer; the text says how."""


class _Refusal(Exception):
    """An option gets an error reply of this kind, with a text for people."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _Payload:
    """An option's bytes, taken from the front."""

    def __init__(self, data: bytes, option: str) -> None:
        self._data = data
        self._at = 0
        self._option = option

    def take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise _Refusal(wire.REP_ERR_INVALID, f"Inconsistent lengths in option {self._option}")
        data, self._at = self._data[self._at : end], end
        return data

    def number(self, form: struct.Struct) -> int:
        value: int = form.unpack(self.take(form.size))[0]
        return value

    def string(self) -> str:
        """A string with its length before it."""
        length = self.number(_U32)
        if length > wire.MAX_STRING:
            raise _Refusal(wire.REP_ERR_INVALID, f"Invalid name length: {length}")
        data = self.take(length)
        if b"\0" in data:
            raise _Refusal(wire.REP_ERR_INVALID, f"Unexpected embedded NUL in option {self._option}")
        return data.decode(errors="surrogateescape")

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(wire.REP_ERR_INVALID, f"option '{self._option}' has unexpected length")


class Handshake:
    """One client's haggling.

    :param offers: looks up what there is at this moment, by name, oldest first.
    :param tls: TLS is to be had, and nothing without it (section "FORCEDTLS mode").
    """

    def __init__(self, offers: Callable[[], Mapping[str, Offer]], *, tls: bool = False) -> None:
        self._offers = offers
        self._tls = tls
        self._secure = False
        self._input = bytearray()
        self._output: list[bytes] = []
        self._option = 0
        self._length = 0
        self._no_zeroes = False
        self._fixed = False
        self._forget()
        self.state = State.FLAGS
        #: What was settled, once the state is TRANSMISSION.
        self.agreement: Agreement | None = None
        #: Why the connection is to be closed, if the client is to blame.
        self.problem: str | None = None

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._contexts_of: str | None = None
        self._contexts: tuple[int, ...] = ()

    def greeting(self) -> bytes:
        """What the server says first."""
        return wire.NBD_MAGIC + wire.OPTION_MAGIC + _U16.pack(wire.FIXED_NEWSTYLE | wire.NO_ZEROES)

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Go on as far as the client's bytes reach.

        :returns: what to send.
        """
        self._input += data
        try:
            while (step := _STEPS.get(self.state)) is not None and step(self):
                pass
            if self.state is State.TLS and self._input:
                # What was sent in the clear must not pass for a part of the secured session.
                raise Disconnect("plain text after NBD_OPT_STARTTLS")
        except Disconnect as problem:
            self.problem = str(problem)
            self.state = State.CLOSED
        output = b"".join(self._output)
        self._output.clear()
        return output

    @property
    def waiting(self) -> bool:
        """Whether nothing is expected from the client, so that what comes all the same is ignored."""
        return self.state not in _STEPS

    def secured(self) -> None:
        """TLS has been started; all that was settled before is forgotten (section "STARTTLS")."""
        self._secure = True
        self._forget()
        self.state = State.OPTION

    def rest(self) -> bytes:
        """The bytes that came after the last option: the first requests."""
        rest = bytes(self._input)
        self._input.clear()
        return rest

    # -- steps: each says whether it could go on

    def _take(self, length: int) -> bytes | None:
        if len(self._input) < length:
            return None
        data = bytes(self._input[:length])
        del self._input[:length]
        return data

    def _receive_flags(self) -> bool:
        data = self._take(4)
        if data is None:
            return False
        (flags,) = _U32.unpack(data)
        if flags & ~(wire.FIXED_NEWSTYLE | wire.NO_ZEROES):
            raise Disconnect(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & wire.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.NO_ZEROES)
        self.state = State.OPTION
        return True

    def _receive_option(self) -> bool:
        data = self._take(wire.OPTION.size)
        if data is None:
            return False
        magic, self._option, self._length = wire.OPTION.unpack(data)
        if magic != wire.OPTION_MAGIC:
            raise Disconnect("an option without its magic")
        if self._length > wire.MAX_PAYLOAD:
            raise Disconnect(f"an option of {self._length} bytes")
        if not self._fixed and self._option != wire.OPT_EXPORT_NAME:
            raise Disconnect("an option other than EXPORT_NAME without fixed newstyle negotiation")
        if self._length <= MAX_OPTION and self._option in _OPTIONS:
            self.state = State.PAYLOAD
        else:
            self.state = State.SKIP
        return True

    def _receive_payload(self) -> bool:
        data = self._take(self._length)
        if data is None:
            return False
        self.state = State.OPTION
        rule = _OPTIONS[self._option]
        try:
            self._permit(rule)
            if data and rule.empty:
                raise _Refusal(wire.REP_ERR_INVALID, f"option '{rule.name}' has unexpected length")
            rule.serve(self, _Payload(data, rule.name))
        except _Refusal as refusal:
            self._refuse(refusal.kind, str(refusal))
        return True

    def _skip_payload(self) -> bool:
        skipped = min(self._length, len(self._input))
        del self._input[:skipped]
        self._length -= skipped
        if self._length:
            return False
        self.state = State.OPTION
        rule = _OPTIONS.get(self._option)
        try:
            self._permit(rule)
            if rule is None:
                raise _Refusal(wire.REP_ERR_UNSUP, f"Unsupported option {self._option} (<unknown>)")
            if rule.empty:
                raise _Refusal(wire.REP_ERR_INVALID, f"option '{rule.name}' has unexpected length")
            raise _Refusal(wire.REP_ERR_TOO_BIG, f"option '{rule.name}' is longer than {MAX_OPTION} bytes")
        except _Refusal as refusal:
            self._refuse(refusal.kind, str(refusal))
        return True

    def _permit(self, rule: _Option | None) -> None:
        if self._tls and not self._secure and not (rule and rule.in_the_clear):
            raise _Refusal(wire.REP_ERR_TLS_REQD, f"Option {self._option:#x} not permitted before TLS")

    # -- answers

    def _reply(self, kind: int, data: bytes = b"") -> None:
        header = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, self._option, kind, len(data))
        self._output.append(header + data)

    def _refuse(self, kind: int, text: str) -> None:
        if self._option == wire.OPT_EXPORT_NAME:
            raise Disconnect(text)
        # A text may quote what the client sent, so it may be as long as that.
        self._reply(kind, text.encode(errors="surrogateescape")[: wire.MAX_STRING])

    # -- options

    def _export_name(self, payload: _Payload) -> None:
        if self._length > wire.MAX_STRING:
            raise Disconnect(f"an export name of {self._length} bytes")
        if self._extended:
            raise Disconnect("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
        offer = self._find(payload.take(self._length).decode(errors="surrogateescape"))
        self._output.append(struct.pack(">QH", offer.size, self._flags(offer)))
        if not self._no_zeroes:
            self._output.append(bytes(124))
        self._agree(offer)

    def _abort(self, payload: _Payload) -> None:
        self._reply(wire.REP_ACK)
        self.state = State.CLOSED

    def _list(self, payload: _Payload) -> None:
        for offer in self._offers().values():
            name = offer.name.encode(errors="surrogateescape")
            description = (offer.description or "").encode(errors="surrogateescape")
            self._reply(wire.REP_SERVER, _U32.pack(len(name)) + name + description)
        self._reply(wire.REP_ACK)

    def _starttls(self, payload: _Payload) -> None:
        if not self._tls:
            raise _Refusal(wire.REP_ERR_POLICY, "TLS not configured")
        if self._secure:
            raise _Refusal(wire.REP_ERR_INVALID, "TLS already enabled")
        self._reply(wire.REP_ACK)
        self.state = State.TLS

    def _info(self, payload: _Payload) -> None:
        offer, knows_block_size = self._inform(payload)
        if offer.minimum_block > 1 and not knows_block_size:
            raise _Refusal(wire.REP_ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
        self._reply(wire.REP_ACK)

    def _go(self, payload: _Payload) -> None:
        offer, _ = self._inform(payload)
        self._reply(wire.REP_ACK)
        self._agree(offer)

    def _inform(self, payload: _Payload) -> tuple[Offer, bool]:
        """Tell about an export; also say whether the client asked for the block sizes."""
        name = payload.string()
        wanted = {payload.number(_U16) for _ in range(payload.number(_U16))}
        payload.end()
        offer = self._find(name)

        def inform(kind: int, data: bytes) -> None:
            self._reply(wire.REP_INFO, _U16.pack(kind) + data)

        if wire.INFO_NAME in wanted:
            inform(wire.INFO_NAME, offer.name.encode(errors="surrogateescape"))
        if offer.description is not None:
            inform(wire.INFO_DESCRIPTION, offer.description.encode(errors="surrogateescape"))
        asked = wire.INFO_BLOCK_SIZE in wanted
        # Who takes up an export without having asked may send what it likes, and is served.
        minimum = offer.minimum_block if asked or self._option == wire.OPT_INFO else 1
        inform(
            wire.INFO_BLOCK_SIZE,
            struct.pack(">III", minimum, max(wire.PREFERRED_BLOCK, minimum), wire.MAX_PAYLOAD),
        )
        inform(wire.INFO_EXPORT, struct.pack(">QH", offer.size, self._flags(offer)))
        return offer, asked

    def _structured_reply(self, payload: _Payload) -> None:
        if self._extended:
            raise _Refusal(wire.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._structured:
            raise _Refusal(wire.REP_ERR_INVALID, "structured reply already negotiated")
        self._reply(wire.REP_ACK)
        self._structured = True

    def _extended_headers(self, payload: _Payload) -> None:
        if self._extended:
            raise _Refusal(wire.REP_ERR_INVALID, "extended headers already negotiated")
        self._reply(wire.REP_ACK)
        self._structured = self._extended = True

    def _list_meta_context(self, payload: _Payload) -> None:
        offer, queries = self._queries(payload)
        for name in offer.contexts:
            namespace = name.partition(":")[0] + ":"
            if not queries or name in queries or namespace in queries:
                self._reply(wire.REP_META_CONTEXT, _U32.pack(0) + name.encode())
        self._reply(wire.REP_ACK)

    def _set_meta_context(self, payload: _Payload) -> None:
        self._contexts_of, self._contexts = None, ()
        offer, queries = self._queries(payload)
        chosen = [number for number, name in enumerate(offer.contexts) if name in queries]
        for number in chosen:
            self._reply(wire.REP_META_CONTEXT, _U32.pack(number) + offer.contexts[number].encode())
        self._reply(wire.REP_ACK)
        self._contexts_of, self._contexts = offer.name, tuple(chosen)

    def _queries(self, payload: _Payload) -> tuple[Offer, set[str]]:
        if not self._structured:
            name = _OPTIONS[self._option].name
            raise _Refusal(
                wire.REP_ERR_INVALID, f"request option '{name}' when structured reply is not negotiated"
            )
        offer = self._find(payload.string())
        known = {query for name in offer.contexts for query in (name, name.partition(":")[0] + ":")}
        queries = set()
        for _ in range(payload.number(_U32)):
            data = payload.take(payload.number(_U32))
            if len(data) <= wire.MAX_STRING:
                queries.add(data.decode(errors="surrogateescape"))
        payload.end()
        # An unknown query must not pass for "no query at all".
        return offer, queries & known | ({""} if queries - known else set())

    def _find(self, name: str) -> Offer:
        try:
            return self._offers()[name]
        except KeyError:
            raise _Refusal(wire.REP_ERR_UNKNOWN, f"export '{name}' not present") from None

    def _flags(self, offer: Offer) -> int:
        return offer.flags | (wire.FLAG_SEND_DF if self._structured else 0)

    def _agree(self, offer: Offer) -> None:
        contexts = self._contexts if self._contexts_of == offer.name else ()
        self.agreement = Agreement(offer.name, self._structured, self._extended, contexts)
        self.state = State.TRANSMISSION


#: What is done in each state; in the others nothing is expected from the client.
_STEPS: Final[Mapping[State, Callable[[Handshake], bool]]] = {
    State.FLAGS: Handshake._receive_flags,
    State.OPTION: Handshake._receive_option,
    State.PAYLOAD: Handshake._receive_payload,
    State.SKIP: Handshake._skip_payload,
}


@dataclass(frozen=True)
class _Option:
    """How an option is served.

    :param name: for messages.
    :param empty: nothing belongs to it.
    :param in_the_clear: it may be asked before TLS where TLS is required.
    """

    name: str
    serve: Callable[[Handshake, _Payload], None]
    empty: bool = False
    in_the_clear: bool = False


_OPTIONS: Final[Mapping[int, _Option]] = {
    wire.OPT_EXPORT_NAME: _Option("export name", Handshake._export_name),
    wire.OPT_ABORT: _Option("abort", Handshake._abort, in_the_clear=True),
    wire.OPT_LIST: _Option("list", Handshake._list, empty=True),
    wire.OPT_STARTTLS: _Option("starttls", Handshake._starttls, empty=True, in_the_clear=True),
    wire.OPT_INFO: _Option("info", Handshake._info),
    wire.OPT_GO: _Option("go", Handshake._go),
    wire.OPT_STRUCTURED_REPLY: _Option("structured reply", Handshake._structured_reply, empty=True),
    wire.OPT_LIST_META_CONTEXT: _Option("list meta context", Handshake._list_meta_context),
    wire.OPT_SET_META_CONTEXT: _Option("set meta context", Handshake._set_meta_context),
    wire.OPT_EXTENDED_HEADERS: _Option("extended headers", Handshake._extended_headers, empty=True),
}
