"""Ten thousand NBD connections that do nothing, and clients that never read: cheap, and in nobody's way.

As many connections as the hard limit of descriptors lets a process have, if those are fewer.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
import served_disks
from daemons import PATIENCE, QMPD, RunningDaemon
from nbd_wire import BLOCK_STATUS, READ, Wire

StartDaemon = Callable[..., RunningDaemon]

#: Descriptors that daemon and test need beside the connections.
OTHERS: Final = 200
WANTED: Final = 10_000
CONNECTIONS: Final = min(WANTED, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - OTHERS)

#: What an idle connection may cost the daemon, in bytes: 4 KiB for what is received, the rest for
#: transport, protocol, timer and socket, which are Python's objects.
EACH: Final = 16 << 10
#: The same of one that has taken up an export: the buffer for its requests has 128 KiB.
EACH_IN_TRANSMISSION: Final = 192 << 10


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    """The test and the daemons that it starts may have as many as the hard limit says."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def crowd_of(daemon: RunningDaemon, number: int) -> Iterator[list[socket.socket]]:
    """So many connections, which are closed at the end of the ``with``."""
    with ExitStack() as stack:
        crowd = []
        for _ in range(number):
            crowd.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            # It waits where the daemon's backlog is full; with a time limit it would fail.
            crowd[-1].connect(str(daemon.directory / "nbd.sock"))
        yield crowd


def descriptors(daemon: RunningDaemon) -> int:
    """The sockets of a daemon: what the event loop keeps besides, some of it in reserve, does not count."""
    directory = Path(f"/proc/{daemon.process.pid}/fd")
    count = 0
    for each in directory.iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(each).startswith("socket:")
    return count


def wait_for_descriptors(daemon: RunningDaemon, wanted: Callable[[int], bool]) -> int:
    deadline = time.monotonic() + PATIENCE
    while not wanted(count := descriptors(daemon)):
        assert time.monotonic() < deadline, f"the daemon has {count} descriptors"
        time.sleep(0.02)
    return count


def assert_served(daemon: RunningDaemon) -> None:
    """A monitor client and an NBD client, both new, are served."""
    with daemon.connect() as monitor:
        monitor.execute("query-version")
    with Wire(daemon.directory / "nbd.sock") as wire:
        wire.go("disk")
        assert wire.ask(READ, 0, 4096).error == 0
    daemon.assert_alive()


def test_ten_thousand_idle_connections_cost_little_and_hold_up_nobody(start_daemon: StartDaemon) -> None:
    daemon = served_disks.start(start_daemon, server=",max-connections=0,handshake-max-seconds=0")
    served_disks.serve(daemon, "raw", "disk", 1 << 20)
    base = descriptors(daemon)
    assert_served(daemon)
    before = daemon.resident_memory()
    with crowd_of(daemon, CONNECTIONS) as crowd:
        wait_for_descriptors(daemon, lambda count: count >= base + CONNECTIONS)
        assert_served(daemon)
        # Some go a little further, and stop in the middle of something.
        for number, one in enumerate(crowd[:: CONNECTIONS // 100]):
            one.sendall((b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\x20" + bytes(40))[: 4 + number % 30])
        assert_served(daemon)
        full = daemon.resident_memory()
    cost = (full - before) / CONNECTIONS
    print(f"{CONNECTIONS} connections, {cost:.0f} bytes each")
    assert cost < EACH
    wait_for_descriptors(daemon, lambda count: count <= base)
    # The second crowd finds the room that the first one left.
    with crowd_of(daemon, CONNECTIONS):
        wait_for_descriptors(daemon, lambda count: count >= base + CONNECTIONS)
        assert daemon.resident_memory() - full < CONNECTIONS * EACH / 4
    wait_for_descriptors(daemon, lambda count: count <= base)
    assert_served(daemon)


def test_ten_thousand_connections_are_dropped_when_their_time_is_up(start_daemon: StartDaemon) -> None:
    daemon = served_disks.start(start_daemon, server=",max-connections=0,handshake-max-seconds=1")
    served_disks.serve(daemon, "raw", "disk", 1 << 20)
    base = descriptors(daemon)
    waiting = select.poll()
    with crowd_of(daemon, CONNECTIONS) as crowd:
        left = {one.fileno() for one in crowd}
        for number in left:
            waiting.register(number, select.POLLRDHUP)
        while left:
            ended = waiting.poll(PATIENCE * 1000)
            assert ended, f"{len(left)} connections are still there"
            for number, _ in ended:
                waiting.unregister(number)
                left.discard(number)
        wait_for_descriptors(daemon, lambda count: count <= base)
        assert_served(daemon)


def test_no_more_connections_are_taken_in_than_allowed(start_daemon: StartDaemon) -> None:
    daemon = served_disks.start(start_daemon, server=",max-connections=100,handshake-max-seconds=2")
    served_disks.serve(daemon, "raw", "disk", 1 << 20)
    base = descriptors(daemon)
    with crowd_of(daemon, 1000):
        most = wait_for_descriptors(daemon, lambda count: count >= base + 100)
        for _ in range(100):
            most = max(most, descriptors(daemon))
            daemon.execute("query-version")
        assert most == base + 100
    # Who waited outside and lost patience is gone by the time it is let in.
    assert_served(daemon)


def test_when_the_descriptors_are_used_up_the_others_are_served_on(start_daemon: StartDaemon) -> None:
    daemon = served_disks.start(
        start_daemon,
        server=",max-connections=0,handshake-max-seconds=1",
        program=("prlimit", "--nofile=128", *QMPD),
    )
    served_disks.serve(daemon, "raw", "disk", 1 << 20)
    with Wire(daemon.directory / "nbd.sock") as early:
        early.go("disk")
        with crowd_of(daemon, 1000):
            # The rest are files of the loop's and of the daemon's own.
            wait_for_descriptors(daemon, lambda count: count >= 100)
            for _ in range(100):
                daemon.execute("query-version")
                assert early.ask(READ, 0, 4096).error == 0
    assert_served(daemon)


def test_a_thousand_clients_that_rest_between_requests_cost_little(start_daemon: StartDaemon) -> None:
    clients = min(1000, CONNECTIONS)
    daemon = served_disks.start(start_daemon, server=",max-connections=0")
    served_disks.serve(daemon, "raw", "disk", 1 << 20)
    base = descriptors(daemon)
    assert_served(daemon)
    before = daemon.resident_memory()
    wires = []
    for _ in range(clients):
        wire = Wire(daemon.directory / "nbd.sock")
        wire.go("disk")
        assert wire.ask(READ, 0, 65536).error == 0
        wires.append(wire)
    cost = (daemon.resident_memory() - before) / clients
    print(f"{cost:.0f} bytes each")
    assert cost < EACH_IN_TRANSMISSION
    assert_served(daemon)
    for wire in wires:
        wire.close()
    wait_for_descriptors(daemon, lambda count: count <= base)


DEAF: Final = 4


def bound_of_a_deaf_client(request_size: int) -> int:
    """What a client that never reads may cost, in bytes, whatever it asks for.

    Sixteen requests are under way at most, and none is begun when 64 MiB are; beside them there is
    a piece that waits in the socket, and what the allocator keeps of the ones before.
    """
    return min(16 * request_size, (64 << 20) + request_size) + (4 << 20)


@pytest.mark.parametrize("request_size", [4096, 1 << 20, 32 << 20])
def test_who_never_reads_costs_little_and_holds_up_nobody(
    start_daemon: StartDaemon, request_size: int
) -> None:
    daemon = served_disks.start(start_daemon)
    served_disks.serve(daemon, "luks", "disk", 32 << 20)
    assert_served(daemon)
    before = daemon.resident_memory()
    wires = []
    for number in range(DEAF):
        wire = Wire(daemon.directory / "nbd.sock")
        wire.negotiate(structured=bool(number % 2), extended=number % 3 == 0)
        if wire.structured or wire.extended:
            wire.meta("disk", "base:allocation")
        wire.go("disk")
        wire.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask_without_end(wire, request_size)
        wires.append(wire)
    assert_served(daemon)
    peak = highest(daemon) - before
    print(f"requests of {request_size} bytes: {peak / DEAF / 1024:.0f} KiB each")
    assert peak < DEAF * bound_of_a_deaf_client(request_size)
    for wire in wires:
        wire.close()
    assert_served(daemon)


def ask_without_end(wire: Wire, request_size: int) -> None:
    """Send requests, mostly to read, until the daemon takes no more of them in.

    :raise TimeoutError: it does not any more.
    """
    for turn in range(200_000):
        status = turn % 3 == 0 and (wire.structured or wire.extended)
        wire.request(BLOCK_STATUS if status else READ, 0, request_size)


def highest(daemon: RunningDaemon) -> int:
    """The most that was resident since the start, in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
