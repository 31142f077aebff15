"""Clients write and verify on one export while a management client plugs, resizes and unplugs other disks.

The clients are libnbd's, one process each, on areas of their own.  Seconds:
``QMPD_STRESS_SECONDS``, else 60 where the peers are required (as in CI), else 20.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import peers
import pytest
import served_disks
from daemons import PATIENCE, CommandError, Connection, RunningDaemon

CLIENTS: Final = 8
AREA: Final = 4 << 20
SECONDS: Final = float(os.environ.get("QMPD_STRESS_SECONDS") or (60 if peers.required() else 20))

#: What may be resident at the end beyond what was after the warm-up, in bytes.  A round makes and
#: ends two disks, a device, an export and their connections, and a minute has some three hundred
#: rounds: a leak of 100 KB a round shows (the key material of one header has 128 KB).  Less than
#: this is the allocator's: requests of 256 KiB come and go in every arena that a thread has touched.
GROWTH: Final = 16 << 20

#: One client: URI, number of its area, size of an area, seconds.  The bytes follow from area,
#: round and place, so that what is stale, misplaced or another's is noticed.
CLIENT: Final = """
import random, sys, time, nbd
uri, number, area, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
choose = random.Random(number)
h = nbd.NBD()
h.set_strict_mode(0)  # An encrypted disk has blocks of 512 bytes, but takes any request.
h.connect_uri(uri)
start = number * area
model = bytearray(area)
h.zero(area, start)
end = time.monotonic() + seconds
rounds = 0
while time.monotonic() < end:
    batch = []
    taken = []
    for _ in range(16):
        length = choose.choice((512, 4096, 4096, 65536, 262144)) + choose.choice((0, 0, 0, 137))
        offset = choose.randrange(area - length)
        if any(offset < e and b < offset + length for b, e in taken):
            continue
        taken.append((offset, offset + length))
        kind = choose.randrange(8)
        if kind < 4:
            data = choose.randbytes(length)
            model[offset:offset + length] = data
            flags = nbd.CMD_FLAG_FUA if choose.randrange(50) == 0 else 0
            batch.append((h.aio_pwrite(data, start + offset, flags=flags), None, 0, 0))
        elif kind == 4:
            model[offset:offset + length] = bytes(length)
            batch.append((h.aio_zero(length, start + offset), None, 0, 0))
        else:
            buffer = nbd.Buffer(length)
            batch.append((h.aio_pread(buffer, start + offset), buffer, offset, length))
    while h.aio_in_flight():
        h.poll(-1)
    for cookie, buffer, offset, length in batch:
        assert h.aio_command_completed(cookie)
        if buffer is not None:
            assert buffer.to_bytearray() == model[offset:offset + length], (number, rounds, offset, length)
    if rounds % 50 == 0:
        assert h.pread(area, start) == model, (number, rounds)
        h.flush()
    rounds += 1
assert h.pread(area, start) == model, number
h.shutdown()
print(rounds)
"""

#: A client of a disk that comes and goes: it may be cut off, but what it reads is right.
VISITOR: Final = """
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
data = b"v" * 65536
h.pwrite(data, 65536)
print("in", flush=True)
while True:
    try:
        found = h.pread(65536, 65536)
    except nbd.Error:
        break
    assert found == data
print("out")
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    # The system's: libnbd's module is installed there.
    command = ["/usr/bin/python3", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def memory(daemon: RunningDaemon, key: str = "VmRSS") -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


class Management:
    """A monitor client that plugs in, resizes and unplugs disks, round after round."""

    def __init__(self, daemon: RunningDaemon, monitor: Connection) -> None:
        self.daemon = daemon
        self.monitor = monitor
        self.rounds = 0
        self.cut_off = 0

    def play_a_round(self) -> None:
        execute = self.monitor.execute
        name = f"guest-{self.rounds}"
        options = {**served_disks.luks_options(self.daemon, "template"), "node-name": name}
        execute("blockdev-add", options)
        device = {"driver": "virtio-blk-pci", "id": f"{name}-device", "drive": name}
        execute("device_add", device)
        execute("block_resize", {"node-name": name, "size": (2 + self.rounds % 3) << 20})
        # The device has a door; the node behind the next one has none but this export.
        door = served_disks.uri(self.daemon, f"{name}-device")
        visitor = python(VISITOR, door) if self.rounds % 4 == 0 else None
        try:
            execute("blockdev-add", {"driver": "null-co", "node-name": f"{name}-null", "size": 1 << 20})
            export = {"type": "nbd", "id": f"{name}-export", "node-name": f"{name}-null"}
            execute("block-export-add", export)
            if visitor is not None:
                assert visitor.stdout is not None
                assert visitor.stdout.readline() == "in\n"
            execute("block-export-del", {"id": f"{name}-export", "mode": "hard"})
            self.monitor.wait_event("BLOCK_EXPORT_DELETED", id=f"{name}-export")
            execute("blockdev-del", {"node-name": f"{name}-null"})
            # Another disk with a door changes its size with every round; an export's does not.
            execute("block_resize", {"node-name": "bystander", "size": (1 + self.rounds % 5) << 20})
            with pytest.raises(CommandError, match="permissions 'resize' are both required"):
                execute("block_resize", {"node-name": "disk", "size": 1 << 20})
            execute("device_del", {"id": f"{name}-device"})
            self.monitor.wait_event("DEVICE_DELETED", device=f"{name}-device")
            execute("blockdev-del", {"node-name": name})
            if visitor is not None:
                said, complaint = visitor.communicate(timeout=PATIENCE)
                assert said == "out\n", complaint
                self.cut_off += 1
        finally:
            if visitor is not None:
                visitor.kill()
                visitor.communicate()
        self.monitor.events.clear()
        self.rounds += 1


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.peer("nbdsh")
@pytest.mark.parametrize(("kind", "seconds"), [("luks", SECONDS), ("raw", SECONDS / 4)])
def test_disks_come_and_go_while_clients_write_and_verify(
    start_daemon: Callable[..., RunningDaemon], kind: str, seconds: float
) -> None:
    daemon = served_disks.start(start_daemon, "--device-exports", "on")
    uri = served_disks.serve(daemon, kind, "disk", CLIENTS * AREA)
    served_disks.add_node(daemon, "raw", "bystander", 1 << 20)
    daemon.execute("device_add", {"driver": "virtio-blk-pci", "id": "by", "drive": "bystander"})
    served_disks.add_node(daemon, "luks", "template", 2 << 20)
    daemon.execute("blockdev-del", {"node-name": "template"})
    clients = [python(CLIENT, uri, number, AREA, seconds) for number in range(CLIENTS)]
    try:
        before = daemon.node_names()
        started = time.monotonic()
        warm = 0
        with daemon.connect() as monitor:
            management = Management(daemon, monitor)
            while any(client.poll() is None for client in clients):
                management.play_a_round()
                assert not any(client.poll() for client in clients), "a client has failed"
                if not warm and time.monotonic() - started > seconds / 4:
                    warm = memory(daemon)
        rounds = []
        for client in clients:
            said, complaint = client.communicate(timeout=PATIENCE)
            assert client.returncode == 0, complaint
            rounds.append(int(said))
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
            if client.stderr is not None and not client.stderr.closed:
                _, complaint = client.communicate()
                print(complaint)
    assert min(rounds) > 0
    assert management.rounds > 4
    assert management.cut_off > 0
    assert daemon.node_names() == before
    assert warm
    assert memory(daemon) - warm < GROWTH
    print(
        f"{rounds=}, {management.rounds=}, {warm >> 20} MiB after warm-up, "
        f"{memory(daemon) >> 20} MiB at the end, {memory(daemon, 'VmHWM') >> 20} MiB at most"
    )
    daemon.assert_alive()


#: A client of a disk whose size changes under it: only what lies in its smallest size is touched.
STEADY: Final = """
import random, sys, time, nbd
uri, smallest, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
choose = random.Random(1)
h = nbd.NBD()
h.connect_uri(uri)
model = bytearray(smallest)
h.zero(smallest, 0)
end = time.monotonic() + seconds
while time.monotonic() < end:
    writes = []
    for place in choose.sample(range(smallest // 65536), 8):
        data = choose.randbytes(65536)
        model[place * 65536:(place + 1) * 65536] = data
        writes.append(h.aio_pwrite(data, place * 65536))
    while h.aio_in_flight():
        h.poll(-1)
    for cookie in writes:
        assert h.aio_command_completed(cookie)
    assert h.pread(smallest, 0) == model
h.shutdown()
"""


@pytest.mark.peer("nbdsh")
@pytest.mark.parametrize("kind", served_disks.KINDS)
def test_a_disk_is_resized_under_its_own_clients(
    start_daemon: Callable[..., RunningDaemon], kind: str
) -> None:
    smallest = 1 << 20
    daemon = served_disks.start(start_daemon, "--device-exports", "on")
    # An export keeps its node's size, as with QEMU; a device goes along, and its door with it.
    served_disks.add_node(daemon, kind, "disk", smallest)
    daemon.execute("device_add", {"driver": "virtio-blk-pci", "id": "door", "drive": "disk"})
    uri = served_disks.uri(daemon, "door")
    client = python(STEADY, uri, smallest, SECONDS / 10)
    resized = 0
    try:
        while client.poll() is None:
            size = smallest << resized % 3
            daemon.execute("block_resize", {"node-name": "disk", "size": size})
            assert os.path.getsize(served_disks.payload(daemon, "disk")) == size
            resized += 1
    finally:
        client.kill()
        _, complaint = client.communicate()
    assert client.returncode == 0, complaint
    assert resized > 10
    daemon.assert_alive()
