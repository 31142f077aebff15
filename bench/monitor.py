"""How fast the monitor is: round trips, pipelines, objects, nodes, start-up, memory.

Each round starts every program afresh, one after the other (A B A B ...), so
that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.servers import STORAGE_DAEMON, Loader, Program, Server, running
from bench.table import Aim, Row, Samples


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often each program is started and measured.
    :param commands: commands in one run of a closed loop or a pipeline.
    :param nodes: nodes that are added, and deleted again.
    :param many_nodes: nodes that a full graph has.
    """

    rounds: int = 3
    commands: int = 10_000
    nodes: int = 4_000
    many_nodes: int = 10_000


QUICK: Final = Settings(rounds=1, commands=200, nodes=100, many_nodes=200)

#: A graph with few nodes, and how many more are added and deleted to see the pace at a size.
FEW_NODES: Final = 100
PROBE: Final = 1_000


def command(name: str, arguments: dict[str, Any] | None = None) -> str:
    """Return the text of a command."""
    return json.dumps({"execute": name, **({"arguments": arguments} if arguments else {})})


QUERY: Final = command("query-version")
OBJECT: Final = command("object-add", {"qom-type": "secret", "id": "s@", "data": "abc123"})
NODE: Final = command("blockdev-add", {"driver": "null-co", "node-name": "n@"})
NODE_GONE: Final = command("blockdev-del", {"node-name": "n@"})

START: Final = Row("start to greeting", "ms")
MEMORY: Final = Row("resident memory after the start", "MiB")
THREE_TIMES: Final = (Aim(3, STORAGE_DAEMON),)
TWICE: Final = (Aim(2, STORAGE_DAEMON),)
ROUND_TRIPS: Final = Row("`query-version`, one at a time", "/s", THREE_TIMES)
PIPELINE: Final = Row("`query-version`, pipelined", "/s", THREE_TIMES)
OBJECTS: Final = Row("`object-add` of a secret", "/s", TWICE)


def run(programs: Sequence[Program], settings: Settings) -> Samples:
    """Measure *programs* in turn and return the samples.

    Daemon and client share one processor: a closed loop over two would measure how
    long the machine takes to wake a sleeping one, which on a virtual machine is most
    of the time and changes from minute to minute.
    """
    samples = Samples()
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        for _ in range(settings.rounds):
            samples.next_round()
            for program in programs:
                with running(program) as server:
                    _measure(program.name, server, settings, samples)
            for program in programs:
                with running(program) as server:
                    _measure_sizes(program.name, server, settings, samples)
    finally:
        os.sched_setaffinity(0, processors)
    return samples


def _measure(name: str, server: Server, settings: Settings, samples: Samples) -> None:
    """Measure what an empty daemon does, then a graph that grows and shrinks."""
    nodes = settings.nodes
    samples.add(START, name, server.start_seconds * 1000)
    samples.add(MEMORY, name, server.resident_memory() / 2**20)
    loader = Loader(server.socket)
    try:
        loader.run(QUERY, 200)  # warms up
        samples.add(ROUND_TRIPS, name, loader.run(QUERY, settings.commands))
        samples.add(PIPELINE, name, loader.run(QUERY, settings.commands, pipelined=True))
        samples.add(OBJECTS, name, loader.run(OBJECT, nodes))
        grow = Row(f"`blockdev-add` of null-co, 0 to {nodes:,} nodes", "/s", TWICE)
        samples.add(grow, name, loader.run(NODE, nodes))
        full = Row(f"resident memory with {nodes:,} nodes and objects", "MiB")
        samples.add(full, name, server.resident_memory() / 2**20)
        shrink = Row(f"`blockdev-del`, {nodes:,} to 0 nodes", "/s", TWICE)
        samples.add(shrink, name, loader.run(NODE_GONE, nodes))
    finally:
        loader.close()


def _measure_sizes(name: str, server: Server, settings: Settings, samples: Samples) -> None:
    """Measure adding and deleting in a small graph and in a large one."""
    loader = Loader(server.socket)
    present = 0
    try:
        for size in (FEW_NODES, settings.many_nodes):
            loader.run(NODE, size - present, first=present, pipelined=True)
            present = size
            add = Row(f"`blockdev-add` beside {size:,} nodes", "/s")
            samples.add(add, name, loader.run(NODE, PROBE, first=size))
            delete = Row(f"`blockdev-del` beside {size:,} nodes", "/s")
            samples.add(delete, name, loader.run(NODE_GONE, PROBE, first=size))
    finally:
        loader.close()
