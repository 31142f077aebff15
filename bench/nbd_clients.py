"""The NBD clients that load a server: nbdcopy for a whole disk, fio for random requests."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: Seconds that a client may take beyond the time it was told to run.
PATIENCE = 120.0

Direction = Literal["read", "write"]


class ClientFailed(Exception):
    """A client that ended with an error, with what it said."""


@dataclass(frozen=True)
class RandomLoad:
    """Requests of one size at random places.

    :param block: bytes of a request, a multiple of 1024.
    :param depth: requests in flight on each connection.
    """

    direction: Direction
    block: int
    depth: int

    def fio(self, uri: str, connections: int, seconds: float) -> list[str]:
        """Return fio's words; each connection is a thread of its own."""
        return [
            *("fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--thread", "--group_reporting"),
            *(f"--rw=rand{self.direction}", f"--bs={self.block}", f"--iodepth={self.depth}"),
            *(f"--numjobs={connections}", "--time_based", f"--runtime={round(seconds * 1000)}ms"),
            *("--norandommap", "--output-format=json"),
        ]

    def run(self, uri: str, connections: int, seconds: float) -> FioResult:
        """Load the server and return what fio measured.

        :raise ClientFailed: fio reports an error.
        """
        return fio_result(_run(self.fio(uri, connections, seconds), seconds), self.direction)


@dataclass(frozen=True)
class FioResult:
    """What fio measured over all its connections.

    :param rate: bytes a second.
    :param requests: requests a second.
    """

    rate: float
    requests: float


def fio_result(output: str, direction: Direction) -> FioResult:
    """Return what fio's JSON says; fio may print warnings before it.

    :raise ClientFailed: it says that there was an error, or nothing of sense.
    """
    try:
        report: dict[str, Any] = json.loads(output[output.index("{") :])
        (job,) = report["jobs"]
        measured = job[direction]
        result = FioResult(rate=measured["bw_bytes"], requests=measured["iops"])
    except (ValueError, KeyError) as error:
        raise ClientFailed(f"fio's report can't be read: {output[:300]!r}") from error
    if job["error"]:
        raise ClientFailed(f"fio reports error {job['error']}")
    return result


def nbdcopy(uri: str, source: Path | None) -> float:
    """Copy the whole disk to nowhere, or *source* onto the whole disk; return seconds.

    :raise ClientFailed: nbdcopy fails.
    """
    words = [uri, "null:"] if source is None else [str(source), uri]
    start = time.perf_counter()
    _run(["nbdcopy", "--", *words], 0)
    return time.perf_counter() - start


def _run(command: Sequence[str], seconds: float) -> str:
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise ClientFailed(f"{command[0]} does not end") from None
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        raise ClientFailed(f"{command[0]}: {said[-1] if said else f'exit status {ended.returncode}'}")
    return ended.stdout
