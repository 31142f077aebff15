"""Which command gets the descriptor that a client passes: over real sockets, with a tiny schema."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import ExitStack

import pytest

from qmpd.monitor.server import Monitor
from qmpd.monitor.unix_stream import UnixStream


class Scene:
    """A monitor with the commands `claim` (tells the name of the descriptor's file) and `wait`."""

    def __init__(self, dispatcher):
        self.go_on = asyncio.Event()
        handlers = {"claim": self.claim, "wait": self.wait, "echo": lambda arguments: arguments}
        self.monitor = Monitor(dispatcher(handlers), {})
        self.client = None

    def connect(self):
        self.client, ours = socket.socketpair()
        self.client.setblocking(False)
        self.received = b""
        UnixStream(self.monitor.connection(), ours).start()
        self.send("qmp_capabilities")

    def claim(self, arguments, client):
        descriptor = client.passed.claim()
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        os.close(descriptor)
        return {"name": name}

    async def wait(self, arguments):
        await self.go_on.wait()
        return {}

    def send(self, *commands, passing=()):
        text = b"".join(json.dumps({"execute": command}).encode() for command in commands)
        if passing:
            socket.send_fds(self.client, [text], [file.fileno() for file in passing])
        else:
            self.client.send(text)

    async def answers(self, number):
        """The next replies: what was returned, or the error's text."""
        loop = asyncio.get_running_loop()
        while self.received.count(b"\n") < number:
            self.received += await asyncio.wait_for(loop.sock_recv(self.client, 1 << 16), 10)
        *lines, self.received = self.received.split(b"\r\n", number)
        replies = [json.loads(line) for line in lines]
        return [reply.get("return", reply.get("error", {}).get("desc")) for reply in replies]


@pytest.fixture
async def scene(dispatcher):
    scene = Scene(dispatcher)
    scene.connect()
    await scene.answers(2)
    yield scene
    scene.go_on.set()
    await scene.monitor.close()
    scene.client.close()


@pytest.fixture
def files(tmp_path):
    """Three open files, a, b and c."""
    with ExitStack() as stack:
        yield [stack.enter_context(open(tmp_path / name, "w")) for name in "abc"]


NONE = "No file descriptor supplied via SCM_RIGHTS"


def exists(descriptor):
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def open_files(directory):
    """How many descriptors of files in a directory the process has."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)]
    return sum(link.startswith(f"{directory}/") for link in links)


async def test_the_first_command_that_asks_gets_the_descriptor(scene, files):
    scene.send("echo", "claim", "claim", passing=files[:1])
    assert await scene.answers(3) == [{}, {"name": "a"}, NONE]


async def test_a_descriptor_that_came_with_another_command_waits_for_one_that_asks(scene, files):
    scene.send("echo", passing=files[:1])
    assert await scene.answers(1) == [{}]
    scene.send("bogus")
    scene.send("claim")
    assert await scene.answers(2) == ["The command bogus has not been found", {"name": "a"}]


async def test_a_newer_descriptor_takes_the_place_of_one_that_nobody_claimed(scene, files, tmp_path):
    before = open_files(tmp_path)
    for file in files:
        scene.send("echo", passing=[file])
        assert await scene.answers(1) == [{}]
    assert open_files(tmp_path) == before + 1
    scene.send("claim")
    assert await scene.answers(1) == [{"name": "c"}]
    assert open_files(tmp_path) == before


async def test_a_descriptor_belongs_to_a_command_that_arrives_in_pieces(scene, files):
    socket.send_fds(scene.client, [b'{"execute": "cl'], [files[0].fileno()])
    await asyncio.sleep(0.01)
    scene.client.send(b'aim"}')
    assert await scene.answers(1) == [{"name": "a"}]


async def test_commands_that_wait_for_another_keep_their_descriptors(scene, files):
    scene.send("wait")
    for file in files:
        scene.send("claim", passing=[file])
    await asyncio.sleep(0.01)
    scene.go_on.set()
    assert await scene.answers(4) == [{}, {"name": "a"}, {"name": "b"}, {"name": "c"}]


async def test_what_one_client_passed_another_can_not_claim(scene, files):
    first = scene.client
    scene.send("echo", passing=files[:1])
    assert await scene.answers(1) == [{}]
    scene.connect()
    await scene.answers(2)
    scene.send("claim")
    assert await scene.answers(1) == [NONE]
    first.close()


async def test_what_a_client_passed_is_closed_when_it_goes(scene, files, tmp_path):
    before = open_files(tmp_path)
    for _ in range(2):
        scene.client.close()
        scene.connect()
        await scene.answers(2)
        scene.send("echo", passing=files)
        assert await scene.answers(1) == [{}]
    while open_files(tmp_path) != before + 1:
        await asyncio.sleep(0.001)
    scene.client.close()
    while open_files(tmp_path) != before:
        await asyncio.sleep(0.001)


async def test_the_monitor_closes_named_descriptors_at_its_end(scene, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    scene.monitor.named.add("x", descriptor)
    await scene.monitor.close()
    assert not exists(descriptor)
