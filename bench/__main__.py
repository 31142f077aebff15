"""``python -m bench``: qmpd beside its peers, as Markdown tables.

The suites are the start (bench/start.py), the monitor (bench/monitor.py), the
data path (bench/data_path.py), unlocking (bench/unlock.py), the sectors of LUKS2
payloads (bench/sectors.py) and libvirt (bench/libvirt.py).  With --write their results also go into the
documents.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from bench import data_path, document, libvirt, monitor, sectors, start, unlock
from bench.chains import CHAINS, NBDKIT
from bench.nbd_servers import nbdkit
from bench.servers import (
    QEMU_SYSTEM,
    QMPD,
    QMPD_SYSTEM,
    STORAGE_DAEMON,
    Program,
    qemu_system,
    qmpd,
    qmpd_system,
    storage_daemon,
)
from bench.table import machine

SUITES: Final = ("start", "monitor", "data-path", "unlock", "sectors", "libvirt")

#: The peers in the order of the tables' columns; qmpd comes last.
PEERS: Final = (STORAGE_DAEMON, NBDKIT)


def main() -> int:
    """Run the suites, print their tables, and write them where that is asked for."""
    arguments = parse()
    programs = [program for program in (storage_daemon(), nbdkit(), qmpd()) if program is not None]
    if arguments.program:
        programs = [program for program in programs if program.name in arguments.program]
    missing = [peer for peer in PEERS if shutil.which(peer) is None]
    if missing:
        print(f"Not installed, and so not compared with: {', '.join(missing)}.\n")
    if not programs:
        return 1
    if arguments.write and (missing or arguments.program):
        print("Nothing is written: the documents have comparisons with all of them.\n")
        arguments.write = False
    if "start" in arguments.only:
        run_start(programs, arguments)
    if "monitor" in arguments.only:
        run_monitor(programs, arguments)
    if "data-path" in arguments.only:
        run_data_path(programs, arguments)
    if "unlock" in arguments.only:
        run_unlock(programs, arguments)
    if "sectors" in arguments.only:
        run_sectors(arguments)
    if "libvirt" in arguments.only:
        run_libvirt(arguments)
    return 0


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare qmpd with its peers.")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    parser.add_argument("--only", choices=SUITES, nargs="+", default=SUITES, help="the suites to run")
    parser.add_argument(
        "--program", choices=(*PEERS, QMPD), nargs="+", help="the programs to measure; all that are installed"
    )
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--write", action="store_true", help="put tables and plot into README.md and docs/")
    path = parser.add_argument_group("data path")
    path.add_argument(
        "--chain",
        dest="chains",
        choices=[chain.name for chain in CHAINS],
        nargs="+",
        help="the chains to measure",
    )
    path.add_argument(
        "--load",
        dest="loads",
        nargs="+",
        metavar="TEXT",
        help="only rows with one of these texts in their title",
    )
    path.add_argument("--connections", type=int, nargs="+", help="numbers of connections of the random loads")
    path.add_argument("--seconds", type=float, help="how long one figure takes")
    path.add_argument("--size", type=int, metavar="MIB", help="size of the disk")
    path.add_argument("--directory", type=Path, help="where the images are made")
    path.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")
    arguments = parser.parse_args()
    if arguments.write and arguments.quick:
        parser.error("--quick gives no numbers that are worth writing")
    return arguments


def run_start(programs: Sequence[Program], arguments: argparse.Namespace) -> None:
    """Compare the starts of the storage daemons, and of the emulators."""
    peer = qemu_system()
    emulators = [*([] if peer is None else [peer]), qmpd_system()]
    storage_daemons = [program for program in programs if program.name != NBDKIT]
    settings = start.QUICK if arguments.quick else start.Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    samples = start.run(storage_daemons, emulators, settings)
    peers = [program.name for program in storage_daemons if program.name != QMPD]
    table = samples.markdown(QMPD, peers, spread=True)
    system_table = samples.markdown(QMPD_SYSTEM, [QEMU_SYSTEM] if peer else [], spread=True)
    used = machine(versions([*storage_daemons, *([peer] if peer else [])]), used="all used")
    table = f"{table}\n\n{system_table}\n\n{used} {settings.rounds} rounds."
    print(f"## The start\n\n{table}\n", flush=True)
    if arguments.write:
        document.write_start(table)


def run_monitor(programs: Sequence[Program], arguments: argparse.Namespace) -> None:
    """Compare the monitors."""
    with_monitor = [program for program in programs if program.name != NBDKIT]
    settings = monitor.QUICK if arguments.quick else monitor.Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    samples = monitor.run(with_monitor, settings)
    peers = [program.name for program in with_monitor if program.name != QMPD]
    table = f"{samples.markdown(QMPD, peers)}\n\n{machine(versions(with_monitor), used='one of them used')}"
    print(f"## The monitor\n\n{table}\n", flush=True)
    if arguments.write:
        document.write_monitor(table)


def run_data_path(programs: Sequence[Program], arguments: argparse.Namespace) -> None:
    """Compare the data paths."""
    for tool in ("nbdcopy", "fio"):
        if shutil.which(tool) is None:
            print(f"The data path is not measured: {tool} is not installed.\n")
            return
    settings = data_path.QUICK if arguments.quick else data_path.Settings()
    given = {
        each.name: value for each in fields(settings) if (value := getattr(arguments, each.name)) is not None
    }
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    if "size" in given:
        given["size"] <<= 20
    settings = replace(settings, **given)
    results = data_path.run(programs, settings)
    peers = [program.name for program in programs if program.name != QMPD]
    text = document.data_path_tables(results, peers, settings, machine(versions(programs), used="all used"))
    print(f"## The data path\n\n{text}\n", flush=True)
    aims = document.aims(results)
    print(f"{aims}\n", flush=True)
    if arguments.write:
        document.write_data_path(text, aims)
    for file in ([arguments.plot] if arguments.plot else []) + ([document.PLOT] if arguments.write else []):
        from bench import plot  # matplotlib is wanted for this alone

        plot.draw(results, peers, file)


def run_unlock(programs: Sequence[Program], arguments: argparse.Namespace) -> None:
    """Compare unlocking with the daemons' and with the programs that do it once."""
    daemons = [program for program in programs if program.name != NBDKIT]
    settings = unlock.QUICK if arguments.quick else unlock.Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    samples = unlock.run(daemons, settings)
    peers = [peer for peer in unlock.PEERS if shutil.which(peer)]
    table = samples.markdown(QMPD, peers, spread=True)
    table = f"{table}\n\n{machine(versions(daemons), used='all used')} {settings.rounds} rounds."
    print(f"## Unlocking\n\n{table}\n", flush=True)
    if arguments.write:
        document.write_unlock(table)


def run_sectors(arguments: argparse.Namespace) -> None:
    """Compare payloads in sectors of 4096 bytes with those of 512."""
    settings = sectors.QUICK if arguments.quick else sectors.Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    samples = sectors.run(settings)
    table = samples.markdown(sectors.LARGE, [sectors.SMALL], spread=True)
    used = machine(versions([qmpd()]), used="all used by nbdcopy, one by the ciphers")
    table = f"{table}\n\n{used} A disk of {settings.size >> 20} MiB, {settings.rounds} rounds."
    print(f"## Sectors of LUKS2 payloads\n\n{table}\n", flush=True)
    if arguments.write:
        document.write_sectors(table)


def run_libvirt(arguments: argparse.Namespace) -> None:
    """Compare the emulators under libvirt."""
    if (program := libvirt.missing()) is not None:
        print(f"Nothing is measured with libvirt: {program} is not installed.\n")
        return
    settings = libvirt.QUICK if arguments.quick else libvirt.Settings()
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    samples = libvirt.run(settings)
    table = samples.markdown(libvirt.QMPD, [libvirt.QEMU], spread=True)
    table = f"{table}\n\n{machine(versions([qmpd()]), used='all used')} {settings.rounds} rounds."
    print(f"## libvirt\n\n{table}\n", flush=True)
    if arguments.write:
        document.write_libvirt(table)


def versions(programs: Sequence[Program]) -> list[str]:
    """Return names and versions of *programs*."""
    return [f"{program.name} {program.version()}" for program in programs]


if __name__ == "__main__":
    sys.exit(main())
