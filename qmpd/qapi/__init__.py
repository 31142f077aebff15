"""The schema language: parser, types, validation, introspection and JSON Schema.

Knows how the wire is described, never what a command does.  Start with
:func:`load`.
"""

from __future__ import annotations

from qmpd.qapi.keyval import HelpRequested
from qmpd.qapi.location import STORAGE_SCHEMA, SYSTEM_SCHEMA, schema_directory
from qmpd.qapi.parser import SchemaError
from qmpd.qapi.schema import Command, Event, Schema, load, loads

__all__ = [
    "STORAGE_SCHEMA",
    "SYSTEM_SCHEMA",
    "Command",
    "Event",
    "HelpRequested",
    "Schema",
    "SchemaError",
    "load",
    "loads",
    "schema_directory",
]
