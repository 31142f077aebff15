"""Commands of `schema/migration.json`: questions about something that can't be done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def migrate_set_capabilities(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Say what migrations are to do."""
    parts.machine.set_migration_capabilities(arguments["capabilities"])
    return {}


def query_migrate_capabilities(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What migrations are to do."""
    return parts.machine.migration_capabilities()


HANDLERS: Final[Mapping[str, Handler]] = {
    "migrate-set-capabilities": migrate_set_capabilities,
    "query-migrate-capabilities": query_migrate_capabilities,
}
