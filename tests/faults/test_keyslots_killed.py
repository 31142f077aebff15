"""A daemon is killed with SIGKILL 200 times while clients change keyslots, and nothing is lost.

Several clients add, replace and erase passphrases of one disk; each says what it begins and what is done,
through a pipe, so the survivor knows which passphrases may open the disk.  The next start opens it with one
of them, and `cryptsetup luksDump` accepts the header every time.

What a killed process has written stays in the page cache, in the order in which it was written; at most its
last write ends early.  Writes in another order, and torn ones, come from `test_keyslots_plans.py`.

Some of the kills are those of a LUKS2 disk.  There a slot may be left whose key is gone already, while the
metadata still names it: nothing opens it, and who comes next erases it by its number.

Most of these daemons are forks of the test's own process, which start in no time and run the graph without a
monitor; some are the real one.  Kills come after random times, from a fixed seed: where they hit is as random
as the machine.  Every other one comes soon after a client's change has begun to be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import luks2_areas
import luks_volumes
import pytest
from conftest import StartDaemon
from daemons import CommandError, Connection, RunningDaemon
from luks_volumes import accepted_by_cryptsetup, carried_out, opens_by_cryptsetup

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.crypto import kdf
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

#: By the version of the format.
KILLS = {1: 130, 2: 70}
KILLS_OF_REAL_DAEMONS = {1: 2, 2: 2}
CLIENTS = 3
SEED = 5

#: Of each client; with those of the others and `base` there is one slot left.
MOST_PASSWORDS = 2


@dataclass
class Client:
    """What is known of a client's passphrases.

    :param settled: these open the disk.
    :param gone: these must not.
    :param pending: what was begun: a passphrase that goes (or None), and one that comes (or None).
    """

    number: int
    settled: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    pending: tuple[str | None, str | None] | None = None
    made: int = 0
    writing: bool = False

    def next_change(self, chance: random.Random) -> tuple[str | None, str | None]:
        """What to do next: which passphrase goes, which one comes."""
        kinds = ["replace", "erase"] * bool(self.settled) + ["add"] * (len(self.settled) < MOST_PASSWORDS)
        kind = chance.choice(kinds)
        goes = chance.choice(sorted(self.settled)) if kind != "add" else None
        return goes, None if kind == "erase" else f"c{self.number}-{self.made}"

    def begin(self, goes: str | None, comes: str | None) -> None:
        self.pending = goes, comes
        if comes is not None:
            self.made = int(comes.rpartition("-")[2]) + 1

    def commit(self) -> None:
        self.writing = True

    def end(self, done: bool) -> None:
        assert self.pending is not None
        self.writing = False
        goes, comes = self.pending
        self.pending = None
        if not done:
            goes, comes = comes, None
        if goes is not None:
            self.settled.discard(goes)
            self.gone.add(goes)
        if comes is not None:
            self.settled.add(comes)

    def survive(self, opening: set[str]) -> None:
        """See that these passphrases are what a kill may have left, and go on from there."""
        goes, comes = self.pending or (None, None)
        self.pending, self.writing = None, False
        mine = {name for name in opening if name.startswith(f"c{self.number}-")}
        certain = self.settled - {goes}
        assert certain <= mine, f"lost: {certain - mine}"
        assert mine <= self.settled | {goes, comes}, f"came back: {mine - self.settled}"
        assert goes is None or comes is None or mine & {goes, comes}, f"neither {goes} nor {comes}"
        self.gone |= {name for name in (goes, comes) if name is not None} - mine
        self.settled = mine


def options_of(goes: str | None, comes: str | None, version: int) -> tuple[dict[str, Any], bool]:
    """QCryptoBlockAmendOptionsLUKS for a change, and whether it takes force."""
    if comes is None:
        return {"state": "inactive", "old-secret": goes}, False
    options = {"state": "active", "new-secret": comes, "iter-time": 1, "secret": "base"}
    if version == 2:
        options["pbkdf"] = "pbkdf2"
    return (options, False) if goes is None else ({**options, "old-secret": goes}, True)


class Disk:
    """A disk with a detached header of some version, and what its clients know."""

    def __init__(self, directory: Path, version: int) -> None:
        self.directory = directory
        self.version = version
        self.volumes: Any = luks2_areas if version == 2 else luks_volumes
        self.header, self.payload = directory / "header.img", directory / "payload.img"
        area = self.volumes.new_area(detached=True)
        self.header.write_bytes(area)
        self.payload.write_bytes(bytes(64 << 10))
        self.clients = [Client(number) for number in range(CLIENTS)]
        self.judge: luks_volumes.Judge = self.volumes.Judge(detached=True)
        self.dead = 0

    def options(self, secret: str) -> dict[str, Any]:
        # No flush: what a killed process wrote is in the page cache, and waiting for a disk finds nothing.
        header, payload = (
            {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
            for path in (self.header, self.payload)
        )
        return {"driver": "luks", "node-name": "d", "file": payload, "header": header, "key-secret": secret}

    def inspect(self, chance: random.Random) -> str:
        """See that nothing is lost after a kill; one of the passphrases that open the disk."""
        accepted_by_cryptsetup(self.header)
        area = self.header.read_bytes()
        present, gone = {"base"}, set()
        for client in self.clients:
            present |= client.settled | {name for name in client.pending or () if name is not None}
            # Those that have been gone for long are not tried again.
            gone |= {*sorted(client.gone, key=lambda name: int(name.rpartition("-")[2]))[-2:]}
        opened = self.judge.opened(area, [name.encode() for name in (*sorted(present), *sorted(gone))])
        assert opened[0] == b"base"
        # Every active slot is somebody's: whoever comes next can get rid of it.
        dead = sorted({*self.judge.header(area).active_slots} - {*opened})
        assert len(dead) <= (self.version == 2)
        if dead:
            self.dead += 1
            self.header.write_bytes(carried_out(area, self.volumes.erasure(area, dead, detached=True)))
        opening = {password.decode() for password in opened.values()}
        for client in self.clients:
            client.survive(opening)
        return chance.choice(sorted(opening))

    def take(self, journal: str) -> None:
        """Learn from a daemon's journal; its last line may be cut off."""
        for line in journal.split("\n")[:-1]:
            number, what, *arguments = json.loads(line)
            getattr(self.clients[number], what)(*arguments)


#: What is said if there is none for another key.
NO_ROOM = (
    "Can't add a keyslot - all keyslots are in use",
    "There is no room for another key in the keyslots area of the LUKS2 header",
)


# -- the daemon without a monitor


def quick(*_: Any, **__: Any) -> Steps[int]:
    """Calibration that takes no time."""
    yield
    return kdf.MIN_ITERATIONS


def serve_until_killed(disk: Disk, secret: str, journal: int, seed: int) -> None:
    """In a fork: open the disk, and change keyslots for several clients until the kill comes."""

    def note(*what: Any) -> None:
        os.write(journal, json.dumps(what).encode() + b"\n")

    async def serve() -> None:
        graph = Graph(DRIVERS, secrets=lambda name: KeyMemory().copy_of(name.encode()))
        node = await graph.add(disk.options(secret))
        os.write(journal, b"\n")

        async def be(client: Client) -> None:
            chance = random.Random(seed * CLIENTS + client.number)
            while True:
                goes, comes = client.next_change(chance)
                options, force = options_of(goes, comes, disk.version)
                client.begin(goes, comes)
                note(client.number, "begin", goes, comes)
                try:
                    await node.amend(
                        {"driver": "luks", **options},
                        force=force,
                        progress=lambda *_: None,
                        commit=partial(note, client.number, "commit"),
                    )
                except Error as error:
                    if error.desc not in NO_ROOM:
                        raise
                    client.end(False)
                    note(client.number, "end", False)
                else:
                    client.end(True)
                    note(client.number, "end", True)

        await asyncio.gather(*(be(client) for client in disk.clients))

    with patch.object(kdf, "calibrating", quick):
        asyncio.run(serve())


def start_fork(disk: Disk, secret: str, seed: int) -> tuple[int, int]:
    """The process id, and the pipe's end with its journal, after it has opened the disk."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Whatever happens, the test's own life is the parent's.
        try:
            os.close(reader)
            serve_until_killed(disk, secret, writer, seed)
        except BaseException as error:
            os.write(writer, f'"{type(error).__name__}: {error}"\n'.encode())
        finally:
            os._exit(1)
    os.close(writer)
    started = os.read(reader, 1)
    assert started == b"\n", f"the disk did not open with {secret}: {os.read(reader, 4096)!r}"
    return pid, reader


def killed(pid: int, reader: int, chance: random.Random, *, writing: bool) -> str:
    """Kill it at some moment, or soon after a change has begun to be written; its journal."""
    journal = b""
    if writing:
        commits = chance.randrange(1, 3)
        while journal.count(b"commit") < commits:
            received = os.read(reader, 4096)
            assert received, journal.decode()
            journal += received
        time.sleep(chance.uniform(0.0, 0.003))
    else:
        time.sleep(chance.uniform(0.0, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as rest:
        return (journal + rest.read()).decode()


@pytest.mark.timeout(300)
@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("version", KILLS)
def test_a_daemon_that_is_killed_at_any_moment_loses_no_passphrase(tmp_path: Path, version: int) -> None:
    disk, chance = Disk(tmp_path, version), random.Random(SEED)
    kills = KILLS[version]
    secret = "base"
    changes = interrupted = 0
    for kill in range(kills):
        pid, reader = start_fork(disk, secret, seed=kill)
        journal = killed(pid, reader, chance, writing=kill % 2 == 1)
        disk.take(journal)
        changes += journal.count('"end"')
        interrupted += any(client.writing for client in disk.clients)
        secret = disk.inspect(chance)
        if kill % 20 == 0:
            assert opens_by_cryptsetup(disk.header, secret.encode())
    print(f"seed {SEED}: {changes} changes, {interrupted} of {kills} kills came while one was written")
    print(f"{disk.dead} slots were left whose keys had gone")
    assert interrupted >= 3


# -- the real one


class QmpClient:
    """A client of the monitor that changes passphrases until the daemon is gone."""

    def __init__(self, daemon: RunningDaemon, client: Client, seed: int, version: int) -> None:
        self._connection: Connection = daemon.connect()
        self._client = client
        self._chance = random.Random(seed)
        self._version = version
        self.patience = time.monotonic() + 10

    def begin(self) -> None:
        goes, comes = self._client.next_change(self._chance)
        options, force = options_of(goes, comes, self._version)
        with contextlib.suppress(CommandError):
            self._connection.execute(
                "object-add", {"qom-type": "secret", "id": str(comes or goes), "data": str(comes or goes)}
            )
        self._client.begin(goes, comes)
        arguments = {"job-id": f"j{self._client.number}", "node-name": "d", "force": force}
        options = {"driver": "luks", **options}
        self._connection.execute("blockdev-amend", {**arguments, "options": options})

    def end(self) -> None:
        job = f"j{self._client.number}"
        self._connection.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded")
        (info,) = [entry for entry in self._connection.execute("query-jobs") if entry["id"] == job]
        self._client.end("error" not in info)
        self._connection.execute("job-dismiss", {"id": job})


def starts(start_daemon: StartDaemon, disk: Disk, secret: str, kill: int) -> RunningDaemon:
    secrets = {secret, "base"} | {name for client in disk.clients for name in client.settled}
    objects = [part for name in sorted(secrets) for part in ("--object", f"secret,id={name},data={name}")]
    daemon = start_daemon(*objects, name=f"daemon-{kill}")
    daemon.execute("blockdev-add", disk.options(secret))
    return daemon


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("version", KILLS_OF_REAL_DAEMONS)
def test_the_real_daemon_loses_none_either(tmp_path: Path, start_daemon: StartDaemon, version: int) -> None:
    disk, chance = Disk(tmp_path, version), random.Random(SEED)
    secret = "base"
    for kill in range(KILLS_OF_REAL_DAEMONS[version]):
        daemon = starts(start_daemon, disk, secret, kill)
        clients = [QmpClient(daemon, client, kill, version) for client in disk.clients]
        for round_number in range(3):
            for client in clients:
                client.begin()
            if round_number < 2:
                for client in clients:
                    client.end()
        time.sleep(chance.uniform(0.0, 1.5))
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
        secret = disk.inspect(chance)
        assert opens_by_cryptsetup(disk.header, secret.encode())
