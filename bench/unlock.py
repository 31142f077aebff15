"""How fast LUKS headers are unlocked, how long other clients wait meanwhile, and how `iter-time` is honoured.

The headers have a keyslot 0 that opens, or eight in use of which the last one
does.  Rates are of `blockdev-add` in a daemon, and of whole runs of `qemu-io`
and `cryptsetup open --test-passphrase`, which take some hundredths of a second
to start.  A daemon has unlocked another disk before, so qmpd has loaded its
ciphers.

Headers of LUKS2 are for qmpd and cryptsetup alone.  Of those the processor time
is compared too, which says more where the machine has something else to do: that
of cryptsetup's whole run, and what the daemon's has grown by.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.luks2_volumes import write_volume
from bench.servers import QMPD, STORAGE_DAEMON, Program, Server, running
from bench.table import Aim, Row, Samples
from qmpd.crypto import kdf, luks1, luks2_kdf
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.steps import run as run_steps

QEMU_IO: Final = "qemu-io"
QEMU_IMG: Final = "qemu-img"
CRYPTSETUP: Final = "cryptsetup"
PEERS: Final = (STORAGE_DAEMON, QEMU_IO, CRYPTSETUP, QEMU_IMG)

PASSPHRASE: Final = b"abc123"
SPEC: Final = CipherSpec("aes-256", "xts", "plain64")
#: Bytes behind the header.
PAYLOAD: Final = 1 << 20
#: Seconds that a reply may take.
PATIENCE: Final = 600.0
#: An image that takes no time to unlock.
QUICKLY: Final = "quickly.luks"


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often everything is measured.
    :param milliseconds: the `iter-time` of the headers.
    :param at_once: how many clients unlock at the same time.
    :param accuracy_runs: how often iterations are chosen, and derived.
    :param memory: the most that argon2 takes, in KiB.
    """

    rounds: int = 3
    milliseconds: int = 2000
    at_once: int = 8
    accuracy_runs: int = 20
    memory: int = luks2_kdf.usual_memory()


QUICK: Final = Settings(rounds=1, milliseconds=10, at_once=2, accuracy_runs=2, memory=32 << 10)


def run(programs: Sequence[Program], settings: Settings) -> Samples:
    """Measure *programs*, and the peers that are installed, in turn."""
    samples = Samples()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        images = list(_images(directory, settings))
        images_of_luks2 = list(_images_of_luks2(directory, settings))
        header, key, plan = run_steps(luks1.formatting(SPEC, "sha256", PASSPHRASE, 1000, 1000))
        key.wipe()
        (directory / QUICKLY).write_bytes(_volume(header, plan))
        for number in range(settings.rounds):
            samples.next_round()
            for image, title, hash_name in images:
                aims = tuple(Aim(1, peer) for peer in (STORAGE_DAEMON, QEMU_IO, CRYPTSETUP))
                row = Row(f"unlocking, {hash_name}, {title}", "/min", aims)
                for peer in (QEMU_IO, CRYPTSETUP):
                    if shutil.which(peer):
                        samples.add(row, peer, 60 / _command(peer, image).seconds)
                for program in programs:
                    samples.add(row, program.name, 60 / _alone(program, image, directory).seconds)
            for image, title in images_of_luks2:
                _measure_luks2(programs, image, title, directory, number, samples)
            for program in programs:
                _measure_latency(program, images[0][0], directory, 1, settings, samples)
                _measure_latency(program, images[0][0], directory, settings.at_once, settings, samples)
            for hash_name in ("sha1", "sha256", "sha512"):
                _measure_iterations(hash_name, directory, settings, samples)
    return samples


# -- headers


def _images(directory: Path, settings: Settings) -> Iterator[tuple[Path, str, str]]:
    for hash_name in ("sha256", "sha1", "sha512"):
        steps = luks1.iterations_for(hash_name, SPEC.key_bytes, settings.milliseconds)
        slot_iterations, digest_iterations = run_steps(steps)
        header, key, plan = run_steps(
            luks1.formatting(SPEC, hash_name, PASSPHRASE, slot_iterations, digest_iterations)
        )
        key.wipe()
        volume = _volume(header, plan)
        path = directory / f"{hash_name}-0.luks"
        path.write_bytes(volume)
        yield path, "keyslot 0", hash_name
        if hash_name != "sha256":
            continue
        # The key material opens any slot with the same salt and iterations; in the others there is nothing.
        last, opening = luks1.SLOTS - 1, header.slots[0]
        first, length = header.material_extent(0)
        material = bytes(volume[first : first + length])
        for slot in range(luks1.SLOTS):
            salt = opening.salt if slot == last else os.urandom(luks1.SALT_BYTES)
            described = replace(opening, salt=salt, key_offset=header.slots[slot].key_offset)
            header = header.with_slot(slot, described)
            offset, _ = header.material_extent(slot)
            volume[offset : offset + length] = material if slot == last else os.urandom(length)
        packed = header.pack()
        volume[: len(packed)] = packed
        path = directory / f"{hash_name}-{last}.luks"
        path.write_bytes(volume)
        yield path, f"keyslot {last} of {luks1.SLOTS} in use", hash_name


def _images_of_luks2(directory: Path, settings: Settings) -> Iterator[tuple[Path, str]]:
    """Volumes with one keyslot each, and what to call them."""
    for kind, cpus in (("argon2id", 1), ("argon2id", luks2_kdf.usual_cpus()), ("pbkdf2", 0)):
        path = directory / f"{kind}-{cpus}.luks"
        if path.exists():
            continue  # on a single processor
        costs = run_steps(
            luks2_kdf.calibrating(
                kind, settings.milliseconds, SPEC.key_bytes, memory=settings.memory, cpus=cpus
            )
        )
        write_volume(path, PASSPHRASE, costs, PAYLOAD)
        title = f"{kind} ({costs.hash_name})"
        if kind != "pbkdf2":
            lanes = "lane" if cpus == 1 else "lanes"
            title = f"{kind} ({costs.memory >> 10} MiB, {costs.iterations} passes, {cpus} {lanes})"
        yield path, f"LUKS2, {title}"


def _volume(header: luks1.Header, plan: Plan) -> bytearray:
    volume = bytearray(header.payload_offset * luks1.SECTOR + PAYLOAD)
    for step in plan:
        if isinstance(step, Write):
            volume[step.offset : step.offset + len(step.data)] = step.data
    return volume


# -- unlocking


class _Taken(NamedTuple):
    """What an unlock has taken.

    :param seconds: by the clock.
    :param processor: of processor time.
    """

    seconds: float
    processor: float


def _measure_luks2(
    programs: Sequence[Program], image: Path, title: str, directory: Path, number: int, samples: Samples
) -> None:
    """Measure qmpd and cryptsetup one right after the other; who is first changes from round to round."""
    rate = Row(f"unlocking, {title}", "/min", (Aim(1, CRYPTSETUP),))
    processor = Row(f"processor time of that, {title}", "s")
    turns: dict[str, Callable[[], _Taken]] = {
        program.name: partial(_alone, program, image, directory)
        for program in programs
        if program.name == QMPD
    }
    if shutil.which(CRYPTSETUP):
        turns[CRYPTSETUP] = partial(_command, CRYPTSETUP, image)
    for name, unlock in list(turns.items())[:: -1 if number % 2 else 1]:
        taken = unlock()
        samples.add(rate, name, 60 / taken.seconds)
        samples.add(processor, name, taken.processor)


def _command(program: str, image: Path) -> _Taken:
    """What a program takes from its start to its end, with an unlock between."""
    secret = f"secret,id=s,data={PASSPHRASE.decode()}"
    options = f"driver=luks,key-secret=s,file.driver=file,file.filename={image}"
    command = {
        QEMU_IO: [QEMU_IO, "-r", "--object", secret, "--image-opts", options, "-c", "quit"],
        CRYPTSETUP: [CRYPTSETUP, "open", "--test-passphrase", "--key-file", "-", str(image)],
    }[program]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, input=PASSPHRASE, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return _Taken(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


class _Client:
    """One client of a monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> float:
        """Execute a command; how many seconds it took."""
        start = time.perf_counter()
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments or {}}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._file.readline())):
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
        return time.perf_counter() - start

    def unlock(self, image: Path, name: str) -> float:
        """Open an image; how many seconds it took."""
        file = {"driver": "file", "filename": str(image), "read-only": True}
        options = {"driver": "luks", "node-name": name, "key-secret": "s", "read-only": True, "file": file}
        return self.execute("blockdev-add", options)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextmanager
def _clients(program: Program, directory: Path, count: int) -> Iterator[tuple[Server, list[_Client]]]:
    """So many clients of one daemon, each with a monitor of its own: qemu-storage-daemon's serve one."""
    paths = [directory / f"monitor{number}" for number in range(count)]
    words = list(program.command)
    for number, path in enumerate(paths):
        words += ["--chardev", f"socket,id=m{number},path={path},server=on,wait=off"]
        words += ["--monitor", f"chardev=m{number}"]
    words += ["--object", f"secret,id=s,data={PASSPHRASE.decode()}"]
    with running(Program(program.name, words)) as server:
        clients = [_Client(path) for path in paths]
        try:
            clients[0].unlock(directory / QUICKLY, "q")
            clients[0].execute("blockdev-del", {"node-name": "q"})
            yield server, clients
        finally:
            for client in clients:
                client.close()
            for path in paths:
                path.unlink(missing_ok=True)


def _alone(program: Program, image: Path, directory: Path) -> _Taken:
    """What `blockdev-add` of an image takes."""
    with _clients(program, directory, 1) as (server, (client,)):
        before = server.processor_seconds()
        seconds = client.unlock(image, "n")
        return _Taken(seconds, server.processor_seconds() - before)


def _measure_latency(
    program: Program, image: Path, directory: Path, count: int, settings: Settings, samples: Samples
) -> None:
    """Measure what somebody else waits for, while so many clients unlock."""
    who = "one client unlocks" if count == 1 else f"{count} clients unlock at once"
    taken: list[float] = []
    with _clients(program, directory, count + 1) as (_, (other, *busy)):
        threads = [
            threading.Thread(target=client.unlock, args=(image, f"n{number}"))
            for number, client in enumerate(busy)
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            taken.append(other.execute("query-version") * 1000)
            time.sleep(0.001)
        seconds = time.perf_counter() - start
    taken.sort()
    samples.add(
        Row(f"`query-version` while {who}: p99", "ms", (Aim(20),)),
        program.name,
        taken[int(len(taken) * 0.99)],
    )
    samples.add(Row(f"`query-version` while {who}: longest", "ms"), program.name, taken[-1])
    if count > 1:
        row = Row(f"unlocking, {count} clients at once", "/min", (Aim(1, STORAGE_DAEMON),))
        samples.add(row, program.name, count * 60 / seconds)


# -- iter-time


def _measure_iterations(hash_name: str, directory: Path, settings: Settings, samples: Samples) -> None:
    """Measure how many iterations are chosen for a time, and how long they really take."""
    asked = settings.milliseconds
    row = Row(f"`iter-time` {asked}, {hash_name}", "iterations", (Aim(1, QEMU_IMG),))
    if shutil.which(QEMU_IMG):
        path = directory / "new.luks"
        secret = f"secret,id=s,data={PASSPHRASE.decode()}"
        options = f"key-secret=s,hash-alg={hash_name},iter-time={asked}"
        command = [QEMU_IMG, "create", "-q", "-f", "luks", "--object", secret, "-o", options, str(path), "1M"]
        subprocess.run(command, check=True)
        header = luks1.Header.parse(path.read_bytes())
        samples.add(row, QEMU_IMG, header.slots[0].iterations)
    chosen = [
        run_steps(kdf.calibrating(hash_name, asked, SPEC.key_bytes))
        for _ in range(max(1, settings.accuracy_runs // settings.rounds))
    ]
    samples.add(row, QMPD, min(chosen))
    errors = []
    for iterations in chosen:
        start = time.thread_time()
        kdf.pbkdf2(hash_name, PASSPHRASE, os.urandom(luks1.SALT_BYTES), iterations, SPEC.key_bytes)
        errors.append(abs((time.thread_time() - start) * 1000 / asked - 1) * 100)
    title = f"{hash_name}: what they take is off the {asked} ms by at most"
    samples.add(Row(title, "% of processor time", (Aim(20),)), QMPD, max(errors))
