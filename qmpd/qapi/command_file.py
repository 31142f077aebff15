"""Checking a file of QMP commands without running them.

The text holds JSON objects one after the other, on as many lines as they like,
in QEMU's dialect (:mod:`qmpd.qjson`).  Every command is checked as
the monitor would check it; the problems come in the order of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qapi.schema import Schema
from qmpd.qjson import located

_MEMBERS: Final = frozenset({"execute", "exec-oob", "arguments", "id"})


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a command.

    :param line: where the command begins, or where its text stops being JSON; from 1.
    """

    line: int
    text: str


def _check_request(schema: Schema, request: Any) -> None:
    """Check one request: first its shape, then the command's arguments.

    :raise Error: in QMP's words.
    """
    if not isinstance(request, dict):
        raise Error("QMP input must be a JSON object")
    name, out_of_band = _command_name(request)
    command = schema.commands.get(name)
    if command is None:
        raise Error(f"The command {name} has not been found")
    if out_of_band and not command.allow_oob:
        raise Error(f"The command {name} does not support OOB")
    command.validate(request.get("arguments", {}))


def _command_name(request: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the command's name, and whether it is to run out of band."""
    for member in request:
        if member not in _MEMBERS:
            raise Error(f"QMP input member '{member}' is unexpected")
    for member in ("execute", "exec-oob"):
        if member in request and not isinstance(request[member], str):
            raise Error(f"QMP input member '{member}' must be a string")
    if "execute" in request and "exec-oob" in request:
        raise Error("QMP input member 'execute' clashes with 'exec-oob'")
    if not isinstance(request.get("arguments", {}), dict):
        raise Error("QMP input member 'arguments' must be an object")
    if "exec-oob" in request:
        return request["exec-oob"], True
    if "execute" in request:
        return request["execute"], False
    raise Error("QMP input lacks member 'execute'")


def problems(schema: Schema, text: str) -> Iterator[Problem]:
    """Yield what is wrong with the commands of a text, at most one problem for each."""
    for line, request in located(text):
        try:
            if isinstance(request, Error):
                raise request
            _check_request(schema, request)
        except Error as error:
            yield Problem(line, error.desc)
