"""The transport of UNIX sockets: what asyncio promises of a transport, on both loops, and descriptors."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import resource
import socket

import pytest

from qmpd.monitor.unix_stream import UnixStream

PATIENCE = 10


class Recorder(asyncio.Protocol):
    """Takes down what it is told."""

    def __init__(self):
        self.received = b""
        self.descriptors = []
        self.ended = asyncio.Event()
        self.lost = asyncio.Event()
        self.error = None
        self.paused = 0
        self.stays = True

    def connection_made(self, transport):
        self.transport = transport

    def descriptor_received(self, descriptor):
        self.descriptors.append((len(self.received), descriptor))

    def data_received(self, data):
        self.received += data

    def eof_received(self):
        self.ended.set()
        return self.stays

    def pause_writing(self):
        self.paused += 1

    def resume_writing(self):
        self.paused -= 1

    def connection_lost(self, error):
        self.error = error
        self.lost.set()


class Unaware(asyncio.Protocol):
    """Knows nothing of descriptors."""

    def __init__(self):
        self.received = b""

    def data_received(self, data):
        self.received += data


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request):
    """Run a coroutine function on a loop of one of the two kinds."""
    if request.param == "uvloop":
        if importlib.util.find_spec("uvloop") is None:
            pytest.skip("uvloop is not installed")
        import uvloop

        factory = uvloop.new_event_loop
    else:
        factory = asyncio.new_event_loop

    def run(function):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(function(), 30))

    return run


class Pair:
    """A stream with its protocol, and the socket at the other end."""

    def __init__(self, protocol=None):
        self.client, ours = socket.socketpair()
        self.client.setblocking(False)
        self.protocol = Recorder() if protocol is None else protocol
        self.stream = UnixStream(self.protocol, ours)
        self.stream.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.stream.abort()
        for _, descriptor in getattr(self.protocol, "descriptors", ()):
            os.close(descriptor)

    async def until(self, condition):
        while not condition():
            await asyncio.sleep(0.001)


def open_files():
    """What the process has open, without the directory in which it looks."""
    links = (f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))


def test_bytes_go_both_ways(on_loop):
    async def scene():
        with Pair() as pair:
            pair.client.send(b"hello")
            await pair.until(lambda: pair.protocol.received == b"hello")
            pair.stream.write(b"you")
            pair.stream.write(b"")
            pair.stream.write(bytearray(b" too"))
            assert pair.client.recv(100) == b"you too"

    on_loop(scene)


def test_a_message_of_any_length_is_received(on_loop):
    async def scene():
        with Pair() as pair:
            loop = asyncio.get_running_loop()
            sent = os.urandom(1 << 20)
            await loop.sock_sendall(pair.client, sent)
            await pair.until(lambda: len(pair.protocol.received) >= len(sent))
            assert pair.protocol.received == sent

    on_loop(scene)


def test_a_descriptor_comes_before_its_bytes_and_closes_on_exec(on_loop, tmp_path):
    (tmp_path / "file").write_bytes(b"contents")

    async def scene():
        with Pair() as pair, open(tmp_path / "file") as file:
            pair.client.send(b"one")
            await pair.until(lambda: pair.protocol.received == b"one")
            socket.send_fds(pair.client, [b"two"], [file.fileno()])
            await pair.until(lambda: pair.protocol.received == b"onetwo")
            ((place, descriptor),) = pair.protocol.descriptors
            assert place == 3
            assert os.pread(descriptor, 100, 0) == b"contents"
            assert not os.get_inheritable(descriptor)

    on_loop(scene)


@pytest.mark.parametrize("number", [2, 3, 100, 253])
def test_of_several_descriptors_the_first_is_taken_and_none_of_the_others_is_left(on_loop, tmp_path, number):
    (tmp_path / "first").touch()
    (tmp_path / "others").touch()

    async def scene():
        with Pair() as pair, open(str(tmp_path / "first")) as first, open(tmp_path / "others") as other:
            before = open_files()
            socket.send_fds(pair.client, [b"x"], [first.fileno()] + [other.fileno()] * (number - 1))
            await pair.until(lambda: pair.protocol.received == b"x")
            ((_, descriptor),) = pair.protocol.descriptors
            assert os.path.samestat(os.fstat(descriptor), os.fstat(first.fileno()))
            assert open_files() == sorted([*before, first.name])

    on_loop(scene)


def test_credentials_that_a_listener_asked_for_do_not_keep_a_descriptor_out(on_loop, tmp_path):
    (tmp_path / "file").touch()

    async def scene():
        client, ours = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        protocol = Recorder()
        stream = UnixStream(protocol, ours)
        stream.start()
        with client, open(tmp_path / "file") as file:
            socket.send_fds(client, [b"x"], [file.fileno()])
            while not protocol.received:
                await asyncio.sleep(0.001)
            ((_, descriptor),) = protocol.descriptors
            os.close(descriptor)
            stream.abort()

    on_loop(scene)


def test_a_protocol_that_knows_nothing_of_descriptors_is_not_left_with_them(on_loop, tmp_path):
    (tmp_path / "file").touch()

    async def scene():
        with Pair(Unaware()) as pair, open(tmp_path / "file") as file:
            before = open_files()
            socket.send_fds(pair.client, [b"x"], [file.fileno()])
            await pair.until(lambda: pair.protocol.received == b"x")
            assert open_files() == before

    on_loop(scene)


def test_a_message_is_read_though_there_is_no_room_for_its_descriptor(on_loop, tmp_path):
    (tmp_path / "file").touch()

    async def scene():
        with Pair() as pair, open(tmp_path / "file") as file:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            socket.send_fds(pair.client, [b"x"], [file.fileno()])
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                await pair.until(lambda: pair.protocol.received == b"x")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert pair.protocol.descriptors == []

    on_loop(scene)


def test_a_client_that_does_not_read_makes_the_protocol_pause_and_gets_everything(on_loop):
    async def scene():
        with Pair() as pair:
            pair.stream.set_write_buffer_limits(high=1000)
            assert pair.stream.get_write_buffer_limits() == (250, 1000)
            sent = os.urandom(1 << 20)
            pair.stream.write(sent)
            pair.stream.write(b"end")
            assert pair.protocol.paused == 1
            assert pair.stream.get_write_buffer_size() > 1000
            received = b""
            while len(received) < len(sent) + 3:
                received += await asyncio.get_running_loop().sock_recv(pair.client, 1 << 16)
            assert received == sent + b"end"
            await pair.until(lambda: pair.protocol.paused == 0)
            assert pair.stream.get_write_buffer_size() == 0

    on_loop(scene)


def test_nothing_is_read_while_reading_is_paused(on_loop):
    async def scene():
        with Pair() as pair:
            pair.stream.pause_reading()
            assert not pair.stream.is_reading()
            pair.client.send(b"x")
            await asyncio.sleep(0.02)
            assert pair.protocol.received == b""
            pair.stream.resume_reading()
            await pair.until(lambda: pair.protocol.received == b"x")

    on_loop(scene)


def test_who_has_said_everything_is_still_answered(on_loop):
    async def scene():
        with Pair() as pair:
            pair.client.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(pair.protocol.ended.wait(), PATIENCE)
            pair.stream.write(b"answer")
            assert pair.client.recv(100) == b"answer"
            assert not pair.stream.is_closing()

    on_loop(scene)


def test_the_end_of_input_is_told_once_and_the_loop_rests(on_loop):
    async def scene():
        with Pair() as pair:
            calls = 0
            receive = pair.stream._receive

            def counted():
                nonlocal calls
                calls += 1
                return receive()

            pair.stream._receive = counted
            pair.client.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(pair.protocol.ended.wait(), PATIENCE)
            await asyncio.sleep(0.02)
            assert calls == 1
            pair.stream.resume_reading()
            assert not pair.stream.is_reading()

    on_loop(scene)


def test_the_end_of_input_closes_unless_the_protocol_wants_to_stay(on_loop):
    async def scene():
        with Pair() as pair:
            pair.protocol.stays = False
            pair.client.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(pair.protocol.lost.wait(), PATIENCE)
            assert pair.client.recv(1) == b""

    on_loop(scene)


def test_what_was_written_before_closing_is_still_sent(on_loop):
    async def scene():
        with Pair() as pair:
            sent = os.urandom(1 << 20)
            pair.stream.write(sent)
            pair.stream.close()
            assert pair.stream.is_closing()
            pair.stream.write(b"too late")
            received = b""
            while more := await asyncio.get_running_loop().sock_recv(pair.client, 1 << 16):
                received += more
            assert received == sent
            await asyncio.wait_for(pair.protocol.lost.wait(), PATIENCE)
            assert pair.protocol.error is None

    on_loop(scene)


def test_aborting_drops_what_waits_and_closes_the_socket(on_loop):
    async def scene():
        with Pair() as pair:
            pair.stream.write(os.urandom(1 << 20))
            pair.stream.abort()
            assert not pair.protocol.lost.is_set()
            await asyncio.wait_for(pair.protocol.lost.wait(), PATIENCE)
            assert pair.stream.get_write_buffer_size() == 0
            assert pair.stream.get_extra_info("socket").fileno() == -1

    on_loop(scene)


@pytest.mark.parametrize("waiting", [0, 1 << 20])
def test_a_client_that_is_gone_ends_the_session_when_something_is_written(on_loop, waiting):
    async def scene():
        with Pair() as pair:
            pair.stream.pause_reading()
            pair.stream.write(bytes(waiting))
            pair.client.close()
            pair.stream.write(b"anybody?")
            await asyncio.wait_for(pair.protocol.lost.wait(), PATIENCE)
            assert isinstance(pair.protocol.error, OSError)
            assert pair.stream.is_closing()

    on_loop(scene)


def test_the_socket_is_known(on_loop):
    async def scene():
        with Pair() as pair:
            assert pair.stream.get_extra_info("socket").family == socket.AF_UNIX
            assert pair.stream.get_extra_info("peername", "nobody") == "nobody"
            assert pair.stream.get_protocol() is pair.protocol

    on_loop(scene)
