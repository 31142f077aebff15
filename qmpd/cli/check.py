"""``qmpd check FILE...``: would these QMP commands be accepted?

Nothing is run.  Each problem is a line ``FILE:LINE: text`` on standard output.
The arguments of ``device_add`` depend on the device and are not looked into.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qmpd.cli.schema import add_emulator_option, load_for
from qmpd.qapi.command_file import problems


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    return Path(name).read_text(encoding="utf-8")


def run(arguments: list[str]) -> int:
    """Check files of commands.

    :param arguments: what follows ``check`` on the command line.
    :return: the exit status: 0 if every command is fine, 1 if not or if a file can't be read.
    """
    parser = argparse.ArgumentParser(
        prog="qmpd check",
        description="Check QMP commands against the schema without running them.",
        epilog="The exit status is 0 if all commands are fine and 1 otherwise.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="JSON objects as a client sends them, on any number of lines; - for standard input",
    )
    add_emulator_option(parser)
    options = parser.parse_args(arguments)
    schema = load_for(options)
    status = 0
    for name in options.files:
        try:
            text = _read(name)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            print(f"qmpd check: cannot read {name}: {reason}", file=sys.stderr)
            status = 1
            continue
        for problem in problems(schema, text):
            print(f"{name}:{problem.line}: {problem.text}")
            status = 1
    return status
