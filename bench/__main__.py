"""``python -m bench [--quick]``: qmpd beside qemu-storage-daemon, as a Markdown table."""

from __future__ import annotations

import argparse
import sys

from bench import monitor
from bench.servers import qmpd, storage_daemon
from bench.table import machine


def main() -> int:
    """Run the suites and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    parser.add_argument("--peer-only", action="store_true", help="measure qemu-storage-daemon alone")
    arguments = parser.parse_args()

    ours, peer = qmpd(), storage_daemon()
    if peer is None:
        print("qemu-storage-daemon is not installed: these are qmpd's own numbers, compared with nothing.\n")
    programs = [program for program in (peer, None if arguments.peer_only else ours) if program is not None]
    if not programs:
        return 1
    samples = monitor.run(programs, monitor.QUICK if arguments.quick else monitor.Settings())
    print(samples.markdown(ours.name, peer.name if peer else None))
    print("\n" + machine([f"{program.name} {program.version()}" for program in programs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
