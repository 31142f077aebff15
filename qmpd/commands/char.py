"""Commands of `schema/char.json`: character devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def query_chardev(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is, and whether somebody is connected."""
    return parts.chardevs()


HANDLERS: Final[Mapping[str, Handler]] = {"query-chardev": query_chardev}
