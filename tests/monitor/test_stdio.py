from __future__ import annotations

import asyncio
import os

import pytest

from qmpd.monitor.stdio import StandardStreams


class Recorder(asyncio.Protocol):
    """Takes down what it is told, and answers each word."""

    def __init__(self):
        self.received = b""
        self.ended = asyncio.Event()
        self.lost = asyncio.Event()
        self.paused = 0

    def connection_made(self, transport):
        self.transport = transport
        transport.write(b"hello\n")

    def data_received(self, data):
        self.received += data

    def eof_received(self):
        self.ended.set()
        return True

    def pause_writing(self):
        self.paused += 1

    def resume_writing(self):
        self.paused -= 1

    def connection_lost(self, error):
        self.lost.set()


async def wait(event):
    await asyncio.wait_for(event.wait(), 10)


@pytest.fixture
async def pipes():
    """Source and sink of a session, and the other end of each."""
    source, ours_out = os.pipe()
    ours_in, sink = os.pipe()
    yield source, sink, ours_out, ours_in
    for descriptor in (source, sink, ours_out, ours_in):
        try:
            os.close(descriptor)
        except OSError:
            pass


async def test_a_session_reads_and_writes_two_pipes_and_survives_the_end_of_input(pipes):
    source, sink, ours_out, ours_in = pipes
    protocol = Recorder()
    streams = StandardStreams(protocol, source, sink)
    streams.start()
    assert os.read(ours_in, 100) == b"hello\n"
    os.write(ours_out, b"question")
    os.close(ours_out)
    await wait(protocol.ended)
    assert protocol.received == b"question"
    streams.write(b"answer")
    assert os.read(ours_in, 100) == b"answer"
    streams.close()
    await wait(protocol.lost)


async def test_regular_files_will_do(tmp_path):
    questions, answers = tmp_path / "questions", tmp_path / "answers"
    questions.write_bytes(b"question " * 20_000)
    protocol = Recorder()
    with questions.open("rb") as source, answers.open("wb") as sink:
        streams = StandardStreams(protocol, source.fileno(), sink.fileno())
        streams.start()
        await wait(protocol.ended)
        streams.close()
        await wait(protocol.lost)
    assert protocol.received == questions.read_bytes()
    assert answers.read_bytes() == b"hello\n"


async def test_a_reader_that_is_slow_is_waited_for(pipes):
    source, sink, _, ours_in = pipes
    protocol = Recorder()
    streams = StandardStreams(protocol, source, sink)
    streams.start()
    streams.write(b"x" * 1_000_000)
    assert protocol.paused == 1
    assert streams.get_write_buffer_size() > 800_000
    streams.close()
    os.set_blocking(ours_in, False)
    received = 0
    while not protocol.lost.is_set():
        try:
            received += len(os.read(ours_in, 1 << 16))
        except BlockingIOError:
            pass
        await asyncio.sleep(0)
    while received < 1_000_006:
        received += len(os.read(ours_in, 1 << 16))
    assert received == 1_000_006
    assert protocol.paused == 0


async def test_a_reader_that_is_gone_ends_the_session(pipes):
    source, sink, _, ours_in = pipes
    protocol = Recorder()
    streams = StandardStreams(protocol, source, sink)
    streams.start()
    os.close(ours_in)
    streams.write(b"anybody?")
    await wait(protocol.lost)
    assert streams.is_closing()


async def test_the_descriptors_are_given_back_as_they_were(pipes):
    source, sink, _, _ = pipes
    protocol = Recorder()
    streams = StandardStreams(protocol, source, sink)
    streams.start()
    assert not os.get_blocking(source)
    streams.abort()
    assert os.get_blocking(source)
    assert os.get_blocking(sink)
