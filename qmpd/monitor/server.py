"""The asyncio side of QMP: any number of clients, each with a session of its own.

A client's bytes become messages (:class:`Session`), messages wait in a queue, and
the queue is worked off in order: synchronous handlers on the spot, asynchronous
ones in a task, during which the queue stands still and other clients go on.
Out-of-band commands go round the queue.

Nobody can make the daemon wait or grow:

- after some milliseconds of work for one client the others get their turn;
- a client with :data:`QUEUE_LIMIT` commands waiting is not read from;
- a client that does not read its replies is not read from either, and its queue
  stands still, once `output_high` bytes are waiting for it;
- of the descriptors that a client passes only the latest is kept, until a command claims it; while a
  command waits that might, the client is not read from;
- events can't be held back that way.  A client for which `output_limit` bytes have
  piled up is disconnected: one that lost some events and does not know it would be
  worse off than one that has to connect again.

A client may send its commands and then stop talking; they are answered.  If it is gone altogether, a
command that only it had an interest in, and that may take long (`Dispatcher.given_up`), is cancelled.  A
UNIX socket tells the two apart; over TCP a client is known to be gone when something is sent to it.

What is sent while one turn lasts goes out in one write.  Nothing here needs uvloop.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Final, cast

from qmpd.descriptors import ClientDescriptors, NamedDescriptors, Passed
from qmpd.monitor.dispatch import Dispatcher, Unfinished
from qmpd.monitor.encode import encode, event
from qmpd.monitor.session import Session

_logger = logging.getLogger(__name__)

#: So many commands may wait for one in front of them before the client is not read from any more.
QUEUE_LIMIT: Final = 8
#: Seconds for which one client's commands may keep the others waiting.
_TURN: Final = 0.005
#: Seconds that a command has for its end, and a client for taking the last replies, when the daemon ends.
_FAREWELL: Final = 2.0
#: Seconds that a command still has when its client has gone: what is nearly done is done.
_GRACE: Final = 0.1
#: Bytes that are collected in one turn before they are handed to the transport.
_FLUSH_SIZE: Final = 64 * 1024


class Connection(asyncio.Protocol):
    """One client.  Made by :class:`Monitor` as the protocol of a new transport."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._passed = Passed()
        self._session = Session(
            monitor.dispatcher.schema, monitor.version, ClientDescriptors(self._passed, monitor.named)
        )
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Any] = deque()
        self._urgent: deque[Any] = deque()
        self._output: list[bytes] = []
        self._output_size = 0
        #: A task awaits a handler of this session: the queue stands still.
        self._busy = False
        #: A turn has been put off until the loop has looked after the others.
        self._scheduled = False
        self._in_turn = False
        self._writing_paused = False
        self._reading_paused = False
        self._input_ended = False
        #: The command under way, if it is to be given up when the client goes.
        self._vain: asyncio.Task[None] | None = None
        self._gone = False
        self._hangup: select.epoll | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        # Not asserted: uvloop's transports are not of this class.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=self._monitor.output_high)
        self._monitor.joined(self)
        self._send(self._session.greeting(), may_have_doubles=False)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; the reply of a command that is being executed is dropped."""
        self._transport = None
        self._watch_no_more()
        self._client_has_gone()
        self._queue.clear()
        self._urgent.clear()
        self._output.clear()
        self._passed.close()
        self._monitor.left(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def descriptor_received(self, descriptor: int) -> None:
        """Keep what was passed with the bytes that come next, in place of what was passed before."""
        self._passed.put(descriptor)

    def data_received(self, data: bytes) -> None:
        """Execute what is complete by now."""
        session = self._session
        queue = self._queue
        for message in session.receive(data):
            if session.goes_first(message):
                self._urgent.append(message)
            else:
                queue.append(message)
        self._work()

    def eof_received(self) -> bool:
        """Answer what was asked before the client stopped talking, then close."""
        self._input_ended = True
        self._watch_for_hangup()
        self._work()
        return True

    def pause_writing(self) -> None:
        """Stop executing: the client does not read what it is told."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Go on."""
        self._writing_paused = False
        self._work()

    # The queue

    def _work(self) -> None:
        """Execute what waits, as far as it goes; then write, and see whether to read on."""
        self._scheduled = False
        if self._in_turn:
            # A handler caused this.
            return
        self._in_turn = True
        dispatcher = self._monitor.dispatcher
        deadline = 0.0
        try:
            while (turn := self._next()) is not None:
                message, out_of_band = turn
                outcome = dispatcher.begin(self._session, message)
                if isinstance(outcome, Unfinished):
                    if not out_of_band:
                        self._busy = True
                    task = self._monitor.run(self._finish(outcome, out_of_band=out_of_band))
                    if not out_of_band and outcome.call.name in dispatcher.given_up:
                        self._vain = task
                        if self._gone:
                            self._loop.call_later(_GRACE, task.cancel)
                elif outcome is not None:
                    self._send(*outcome)
                now = perf_counter()
                if not deadline:
                    deadline = now + _TURN
                elif now > deadline:
                    self._schedule()
                    break
        finally:
            self._in_turn = False
        self._flush()
        self._adjust()

    def _next(self) -> tuple[Any, bool] | None:
        """The message whose turn it is and whether it is out of band, if any can be executed now."""
        if self._writing_paused or self._monitor.stopped:
            return None
        if self._urgent:
            return self._urgent.popleft(), True
        if self._queue and not self._busy:
            return self._queue.popleft(), False
        return None

    async def _finish(self, unfinished: Unfinished, *, out_of_band: bool) -> None:
        """Await a handler; in a task of its own, so that it may use all that asyncio offers."""
        try:
            reply = await self._monitor.dispatcher.finish(unfinished)
        except asyncio.CancelledError:
            # Whatever else the client has said is still to be looked at.
            self._schedule()
            raise
        finally:
            if not out_of_band:
                self._busy = False
                self._vain = None
        if reply is not None and self._transport is not None:
            self._send(*reply)
        self._work()

    # A client that is gone

    def _client_has_gone(self) -> None:
        self._gone = True
        if self._vain is not None:
            self._loop.call_later(_GRACE, self._vain.cancel)

    def _watch_for_hangup(self) -> None:
        """Notice if the client does not listen either; its transport does not look after that any more."""
        assert self._transport is not None, "who stops talking is there"
        connection = self._transport.get_extra_info("socket")
        if connection is None:
            return
        # A hang-up is told of whether it is asked for or not, and nothing else is to be told of.
        self._hangup = select.epoll()
        self._hangup.register(connection.fileno(), 0)
        self._loop.add_reader(self._hangup.fileno(), self._hung_up)

    def _hung_up(self) -> None:
        self._watch_no_more()
        self._client_has_gone()

    def _watch_no_more(self) -> None:
        if self._hangup is not None:
            self._loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
            self._hangup = None

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._work)

    def _adjust(self) -> None:
        """Read from the client only while there is room for what it says."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        waiting = bool(self._queue or self._urgent)
        if self._input_ended and not waiting and not self._busy:
            transport.close()
            return
        if self._input_ended:
            return
        full = self._writing_paused or len(self._queue) >= QUEUE_LIMIT or self._monitor.stopped
        if waiting and self._passed:
            # The next descriptor would take the place of one that a waiting command may be about.
            full = True
        if full != self._reading_paused:
            self._reading_paused = full
            if full:
                transport.pause_reading()
            else:
                transport.resume_reading()

    # Output

    def _send(self, message: Mapping[str, Any], may_have_doubles: bool) -> None:
        self._put(encode(message, pretty=self._monitor.pretty, may_have_doubles=may_have_doubles))

    def _put(self, data: bytes) -> None:
        self._output.append(data)
        self._output_size += len(data)
        if self._output_size > _FLUSH_SIZE:
            self._flush()

    def _flush(self) -> None:
        if self._output and self._transport is not None:
            data = self._output[0] if len(self._output) == 1 else b"".join(self._output)
            self._output.clear()
            self._output_size = 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def tell(self, data: bytes) -> None:
        """Send an event, if the client wants events by now.

        :param data: as it goes on the wire.
        """
        if self._transport is None or self._transport.is_closing() or not self._session.wants_events:
            return
        waiting = self._transport.get_write_buffer_size() + self._output_size
        if waiting + len(data) > self._monitor.output_limit:
            _logger.warning("a client that does not read (%d bytes wait for it) is disconnected", waiting)
            self._output.clear()
            self._output_size = 0
            self._transport.abort()
            return
        self._put(data)
        if not self._in_turn:
            # Several events are often caused at once; they go out together.
            self._schedule()

    def part(self) -> None:
        """Write what is to be written, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


class Monitor:
    """QMP for all the clients of one character device.

    :param dispatcher: executes the commands.
    :param version: the greeting's member `version`, as `query-version` returns it.
    :param pretty: write messages over several lines.
    :param named: the descriptors that clients give names.
    :param output_high: bytes waiting for a client above which its commands are not executed.
    :param output_limit: bytes waiting for a client above which an event disconnects it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        version: Mapping[str, Any],
        pretty: bool = False,
        named: NamedDescriptors | None = None,
        *,
        output_high: int = 1024 * 1024,
        output_limit: int = 16 * 1024 * 1024,
    ) -> None:
        self.dispatcher = dispatcher
        self.version = version
        self.pretty = pretty
        self.named = named or NamedDescriptors()
        self.output_high = output_high
        self.output_limit = output_limit
        #: Whether commands are not executed any more.
        self.stopped = False
        self._connections: dict[Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection(self) -> Connection:
        """Make the protocol for a new client's transport; it is greeted when the transport is there."""
        return Connection(self)

    def joined(self, connection: Connection) -> None:
        """Take note of a client that is there now."""
        self._connections[connection] = None

    def left(self, connection: Connection) -> None:
        """Forget a client."""
        self._connections.pop(connection, None)

    def run(self, coroutine: Any) -> asyncio.Task[None]:
        """Run the rest of a command."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        # The loop itself holds tasks only weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def emit(self, name: str, data: Mapping[str, Any], nanoseconds: int | None = None) -> None:
        """Send an event to every client that has negotiated, in order with its replies.

        :param name: the event, such as JOB_STATUS_CHANGE.
        :param data: its members; if there are none, `data` is left out of the message.
        :param nanoseconds: when it happened, since the epoch; None for now.
        """
        if self._connections:
            encoded = encode(event(name, data, nanoseconds), pretty=self.pretty)
            for connection in list(self._connections):
                connection.tell(encoded)

    def stop(self) -> None:
        """Execute no further command (`quit`); those that were begun are still answered."""
        self.stopped = True

    async def close(self) -> None:
        """Stop, await the commands that were begun, and take leave of every client.

        A command that takes long (an unlock) has two seconds, then it is cancelled; so
        has a client that does not read, then its connection is cut.
        """
        self.stop()
        # The caller may be one of the commands, so wait for the others only.
        others = self._tasks - {asyncio.current_task()}
        if others:
            _, unfinished = await asyncio.wait(others, timeout=_FAREWELL)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        connections = list(self._connections)
        for connection in connections:
            connection.part()
        closed = [connection.closed for connection in connections]
        if closed:
            await asyncio.wait(closed, timeout=_FAREWELL)
        for connection in list(self._connections):
            connection.cut()
        self.named.close()


#: What a character device asks of whatever talks over it.
ProtocolFactory = Callable[[], asyncio.Protocol]
