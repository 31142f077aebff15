"""``qmpd schema``: everything on the wire, as JSON Schema.

With ``--emulator`` what only ``qmpd-system-x86_64`` has is there as well.  An
editor that is given the output completes and checks QMP commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qmpd.qapi import STORAGE_SCHEMA, SYSTEM_SCHEMA, Schema, load, schema_directory


def add_emulator_option(parser: argparse.ArgumentParser) -> None:
    """Let a subcommand that looks into the schema be asked for the emulator's."""
    parser.add_argument(
        "--emulator",
        action="store_true",
        help="take the schema of qmpd-system-x86_64, which has commands about a machine besides",
    )


def load_for(options: argparse.Namespace) -> Schema:
    """Load the schema that is asked for by `add_emulator_option`."""
    return load(schema_directory(), SYSTEM_SCHEMA if options.emulator else STORAGE_SCHEMA)


def run(arguments: list[str]) -> int:
    """Print or write the schema.

    :param arguments: what follows ``schema`` on the command line.
    :return: the exit status: 0, or 1 if the output can't be written.
    """
    parser = argparse.ArgumentParser(
        prog="qmpd schema",
        description="Print the schema of qmpd's commands, types and events as JSON Schema 2020-12.",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write to FILE, not to standard output")
    parser.add_argument(
        "--introspection",
        action="store_true",
        help="print what the command query-qmp-schema answers instead",
    )
    add_emulator_option(parser)
    options = parser.parse_args(arguments)
    schema = load_for(options)
    document = schema.introspection() if options.introspection else schema.json_schema()
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
        return 0
    try:
        Path(options.output).write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"qmpd schema: cannot write {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
