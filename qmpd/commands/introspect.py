"""Commands of `schema/introspect.json`: the schema describes itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def query_qmp_schema(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that can be sent and received."""
    return parts.schema.introspection()


HANDLERS: Final[Mapping[str, Handler]] = {"query-qmp-schema": query_qmp_schema}
