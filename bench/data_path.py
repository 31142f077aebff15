"""How fast the data path is: NBD servers of the same disk, loaded by nbdcopy and fio.

For each chain of ``chains`` every server gets its own copy of the image, in the
page cache.  In each round all servers are started afresh and stay for the whole
round; each load then meets them one right after the other, so the ratio of two
figures of a round is that of the same few seconds of the machine.  Who is
first changes from round to round.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Final

from bench.chains import CHAINS, NBDKIT, Chain, filled
from bench.monitor import QUERY
from bench.nbd_clients import PATIENCE, ClientFailed, Direction, RandomLoad, fio_result, nbdcopy
from bench.nbd_servers import NbdServer, ServerFailed
from bench.servers import Loader, Program
from bench.table import Aim, Row, Samples

#: The aims that every chain has.
MILLISECONDS: Final = (Aim(5),)
MEGABYTES: Final = (Aim(150),)

KIB: Final = 1024

#: Whole-disk copies, with nbdcopy's own choice of connections and depth.
COPIES: Final[tuple[Direction, ...]] = ("read", "write")

#: Random loads, each done with every number of connections, and which of a chain's aims is about it.
RANDOM: Final = tuple(
    (RandomLoad(direction, block * KIB, depth), aims)
    for block, depth, aims in (
        (256, 8, attrgetter("large")),
        (4, 1, attrgetter("alone")),
        (4, 16, attrgetter("queued")),
        (4, 64, attrgetter("deep")),
    )
    for direction in ("read", "write")
)

#: Loads that saturate a server while a client talks to its monitor.
SATURATING: Final = (RandomLoad("read", 4 * KIB, 64), RandomLoad("read", 256 * KIB, 8))

#: Seconds that a saturating load has run when the monitor's client begins, and that it runs on after it.
MARGIN: Final = 0.4

#: Seconds that the monitor's client waits after each reply.
PAUSE: Final = 0.001

#: How much longer than the other figures this one takes: a 99th percentile wants many samples.
LATENCY_TIMES: Final = 2


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often each load meets each server.
    :param seconds: how long fio runs for one figure.
    :param size: bytes of the disk, a multiple of 1 MiB.
    :param connections: numbers of connections for the random loads.
    :param chains: names of the chains that are measured.
    :param loads: only rows whose title contains one of these; all without any.
    :param directory: where the images are: on the file system that is to be measured, not on tmpfs.
    """

    rounds: int = 5
    seconds: float = 1.0
    size: int = 1 << 30
    connections: tuple[int, ...] = (1, 4, 16)
    chains: tuple[str, ...] = tuple(chain.name for chain in CHAINS)
    loads: tuple[str, ...] = ()
    directory: Path = Path(tempfile.gettempdir())


QUICK: Final = Settings(rounds=1, seconds=0.5, size=256 << 20, connections=(1,))


@dataclass(frozen=True)
class Load:
    """A row of the table, and how its value is measured on a server.

    :param writes: whether it leaves dirty pages behind.
    """

    row: Row
    measure: Callable[[NbdServer], float]
    writes: bool


@dataclass
class Measured:
    """What was measured of one chain.

    :param remarks: what went wrong, a sentence each.
    """

    chain: Chain
    samples: Samples = field(default_factory=Samples)
    remarks: list[str] = field(default_factory=list)


def copy_title(direction: Direction) -> str:
    """Return what the table calls a copy of the whole disk."""
    return f"nbdcopy, {direction} whole disk"


def random_title(load: RandomLoad, connections: int) -> str:
    """Return what the table calls a random load."""
    several = f", {connections} connections" if connections > 1 else ""
    return f"{load.block // KIB} KiB random {load.direction}, depth {load.depth}{several}"


def run(programs: Sequence[Program], settings: Settings) -> list[Measured]:
    """Measure every chain of *settings* and return what came of it."""
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-data-path-", dir=settings.directory) as name:
        source = Path(name, "source.raw")
        write_source(source, settings.size)
        for chain in CHAINS:
            if chain.name in settings.chains:
                results.append(_measure_chain(chain, programs, settings, source))
    return results


def write_source(path: Path, size: int) -> None:
    """Fill *path* with *size* bytes of a fixed pattern that no program takes for zeroes."""
    block = random.Random(1).randbytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)


def _measure_chain(chain: Chain, programs: Sequence[Program], settings: Settings, source: Path) -> Measured:
    measured = Measured(chain)
    with _servers(chain, programs, source, settings.size) as servers:
        loads = chosen_loads(chain, settings, source)
        for number in range(settings.rounds):
            measured.samples.next_round()
            first = number % len(servers)
            in_turn = servers[first:] + servers[:first]
            _round(in_turn, loads, settings, measured, f"round {number + 1}/{settings.rounds}, {chain.name}")
    return measured


@contextmanager
def _servers(chain: Chain, programs: Sequence[Program], source: Path, size: int) -> Iterator[list[NbdServer]]:
    """Give every program its image of *chain* in the page cache; take the images away at the end."""
    with ExitStack() as stack:
        images = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{chain.name}-", dir=source.parent))
        servers: list[NbdServer] = []
        for program in programs:
            if program.name == NBDKIT and chain.nbdkit is None:
                continue
            image = Path(images, program.name)
            if servers:
                shutil.copyfile(servers[0].image, image)
            else:
                for command in chain.make:
                    subprocess.run(
                        filled(command, source=str(source), image=str(image), size=str(size)), check=True
                    )
                if chain.fresh:
                    shutil.copyfile(image, _unused(image))
            settle(image)
            # Not beside the image: the path of a socket has to be short.
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            server = NbdServer(program, chain, image, Path(directory))
            stack.callback(server.stop)
            servers.append(server)
        yield servers


def _unused(image: Path) -> Path:
    """Return the file that has what *image* was made as: all programs begin with the same."""
    return image.with_name("unused")


def _renew(server: NbdServer) -> None:
    """End *server*, and give it an image that nobody has written yet."""
    server.stop()
    shutil.copyfile(_unused(server.image), server.image)


def settle(image: Path) -> None:
    """Have all of *image* in the page cache, and nothing of it still to be written."""
    with image.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def chosen_loads(chain: Chain, settings: Settings, source: Path) -> list[Load]:
    """Return the loads of *chain* in the order of the table, those that *settings* leave in."""

    def copying(direction: Direction) -> Callable[[NbdServer], float]:
        from_file = source if direction == "write" else None
        return lambda server: settings.size / nbdcopy(server.uri, from_file) / 1e6

    def random_load(load: RandomLoad, connections: int) -> Callable[[NbdServer], float]:
        def measure(server: NbdServer) -> float:
            result = load.run(server.uri, connections, settings.seconds)
            return result.requests if load.block == 4 * KIB else result.rate / 1e6

        return measure

    loads = [
        Load(Row(copy_title(direction), "MB/s", chain.aims.copies), copying(direction), direction == "write")
        for direction in COPIES
    ]
    for connections in settings.connections:
        for load, aims in RANDOM:
            unit = "IOPS" if load.block == 4 * KIB else "MB/s"
            title = Row(random_title(load, connections), unit, aims(chain.aims))
            loads.append(Load(title, random_load(load, connections), load.direction == "write"))
    return [load for load in loads if _is_chosen(load.row, settings)]


def _is_chosen(row: Row, settings: Settings) -> bool:
    return not settings.loads or any(part in row.title for part in settings.loads)


def _round(
    servers: Sequence[NbdServer], loads: Sequence[Load], settings: Settings, measured: Measured, title: str
) -> None:
    """Start every server, let every load meet them all, and end them."""
    able = [server for server in servers if _attempt(server, measured, "start", _warm_up) is not None]
    for load in loads:
        figures = []
        for server in able:
            if server.chain.fresh:
                _renew(server)
            value = _attempt(server, measured, load.row.title, load.measure)
            if load.writes:
                settle(server.image)
            if value is not None:
                measured.samples.add(load.row, server.program.name, value)
                figures.append(f"{server.program.name} {value:,.0f}")
        _progress(f"{title}: {load.row.title} ({load.row.unit}): {', '.join(figures)}")
    for saturating in SATURATING:
        for server in able:
            if server.has_monitor:
                _measure_monitor(server, saturating, settings, measured)
    memory = Row("resident memory at its peak in all these loads", "MB", MEGABYTES)
    for server in able:
        # Where every load has a server of its own, none of them knows about all.
        if _is_chosen(memory, settings) and not server.chain.fresh:
            peak = _attempt(server, measured, memory.title, lambda server: server.peak_memory() / 1e6)
            if peak is not None:
                measured.samples.add(memory, server.program.name, peak)
    for server in able:
        server.stop()


def _warm_up(server: NbdServer) -> float:
    return nbdcopy(server.uri, None)


def _measure_monitor(server: NbdServer, load: RandomLoad, settings: Settings, measured: Measured) -> None:
    """Measure round trips on the monitor while *load* lasts."""
    title = f"`query-version` during {random_title(load, 1)}"
    rows = [
        Row(f"{title}: {which}", "ms", MILLISECONDS if which == "p99" else ())
        for which in ("median", "p99", "longest")
    ]
    if not any(_is_chosen(row, settings) for row in rows):
        return

    taken: list[float] = []

    def measure(server: NbdServer) -> float:
        taken[:] = saturated_latencies(server, load, LATENCY_TIMES * settings.seconds)
        return 0.0

    if _attempt(server, measured, title, measure) is not None:
        for row, percent in zip(rows, (50, 99, 100), strict=True):
            seconds = percentile(taken, percent)
            measured.samples.add(row, server.program.name, seconds * 1000)


def saturated_latencies(server: NbdServer, load: RandomLoad, seconds: float) -> list[float]:
    """Return seconds of each round trip on the monitor while *load* lasts.

    :raise ClientFailed: the load or the monitor's client failed, or the load did not outlast the client.
    """
    command = load.fio(server.uri, 1, seconds + 2 * MARGIN)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as fio:
        try:
            loader = Loader(server.monitor)
            try:
                time.sleep(MARGIN)
                taken = loader.latencies(QUERY, seconds, PAUSE)
            except (RuntimeError, OSError) as error:
                raise ClientFailed(f"the monitor's client: {error}") from error
            finally:
                loader.close()
            if fio.poll() is not None:
                raise ClientFailed("fio ended before the monitor's client")
            output, _ = fio.communicate(timeout=PATIENCE)
            fio_result(output, load.direction)
        except subprocess.TimeoutExpired:
            raise ClientFailed("fio does not end") from None
        finally:
            fio.kill()
    return taken


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that is not below *percent* per cent of *values*."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def _attempt(
    server: NbdServer, measured: Measured, title: str, measure: Callable[[NbdServer], float]
) -> float | None:
    """Measure, a second time with a fresh server if it fails; return None if it fails again."""
    remark = ""
    for _ in range(2):
        try:
            server.start()
            return measure(server)
        except (ServerFailed, ClientFailed) as error:
            remark = f"{server.program.name}, {title}: {error}"
            server.stop()
        if remark not in measured.remarks:
            measured.remarks.append(remark)
            _progress(remark)
    return None


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
