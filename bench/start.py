"""How long a program takes from its start to the greeting on its monitor, and an emulator to answer libvirt.

libvirt starts an emulator to ask it what it can do, once for every version of the
file, and again and again where it mistrusts the answers: in the background, and
with the queries of :data:`PROBING`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.servers import PATIENCE, Program, running
from bench.table import Row, Samples

GREETING: Final = Row("start to greeting", "ms")
PROBED: Final = Row("start to the end of libvirt's probing", "ms")


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often each program is started for a figure.
    """

    rounds: int = 10


QUICK: Final = Settings(rounds=1)

_DEVICES: Final = (
    "virtio-blk-pci scsi-hd ide-hd PIIX4_PM kvm-pit ICH9-LPC virtio-balloon-pci virtio-balloon-ccw "
    "virtio-balloon-device usb-host"
)

#: What libvirt 11.3 asks, in its order: commands, and the `typename` of those that take one.
PROBING: Final[Sequence[tuple[str, str | None]]] = (
    ("qmp_capabilities", None),
    ("query-version", None),
    ("query-target", None),
    ("query-qmp-schema", None),
    ("query-kvm", None),
    ("qom-list-types", None),
    *(("device-list-properties", device) for device in _DEVICES.split()),
    ("qom-list-properties", "memory-backend-file"),
    ("query-machines", None),
    ("qom-list-properties", "none-machine"),
    ("qom-list-properties", "generic-pc-machine"),
    ("query-tpm-models", None),
    ("query-command-line-options", None),
    ("query-migrate-capabilities", None),
)


def run(storage_daemons: Sequence[Program], emulators: Sequence[Program], settings: Settings) -> Samples:
    """Start all programs in turn and return the samples."""
    samples = Samples()
    for _ in range(settings.rounds):
        samples.next_round()
        for program in (*storage_daemons, *emulators):
            with running(program) as server:
                samples.add(GREETING, program.name, server.start_seconds * 1000)
        for program in emulators:
            samples.add(PROBED, program.name, _probe(program) * 1000)
    return samples


def _probe(program: Program) -> float:
    """Start an emulator and ask it what libvirt asks; return how many seconds all of it took."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path, pid_file = Path(directory, "qmp.monitor"), Path(directory, "qmp.pid")
        options = ["-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pid_file), "-daemonize"]
        start = time.perf_counter()
        subprocess.run([*program.command, *options], check=True)
        try:
            for _ in _replies(path):
                pass
            return time.perf_counter() - start
        finally:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


def _replies(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the replies to PROBING: results, and errors of those that do not know a device or command."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        with client.makefile("rb") as received:
            received.readline()
            for name, type_name in PROBING:
                arguments = {} if type_name is None else {"arguments": {"typename": type_name}}
                client.sendall(json.dumps({"execute": name, **arguments}).encode() + b"\r\n")
                line = received.readline()
                if not line:
                    raise RuntimeError(f"no answer to {name}")
                yield json.loads(line)
