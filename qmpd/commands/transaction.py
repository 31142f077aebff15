"""Commands of `schema/transaction.json`: several changes of the block graph as one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from qmpd.block import snapshots
from qmpd.block.change import Change
from qmpd.commands.block_core import snapshot_sync
from qmpd.commands.parts import Handler, Parts
from qmpd.errors import Error


async def _abort(parts: Parts, data: dict[str, Any], change: Change) -> None:
    raise Error("Transaction aborted using Abort action")


async def _snapshot(parts: Parts, data: dict[str, Any], change: Change) -> None:
    await snapshots.put_overlay(parts.graph, data["node"], data["overlay"], change)


async def _snapshot_internal(parts: Parts, data: dict[str, Any], change: Change) -> None:
    await snapshots.create_internal(parts.graph, data["device"], data["name"], change)


#: By TransactionActionKind.
_ACTIONS: Final[Mapping[str, Callable[[Parts, dict[str, Any], Change], Awaitable[None]]]] = {
    "abort": _abort,
    "blockdev-snapshot": _snapshot,
    "blockdev-snapshot-internal-sync": _snapshot_internal,
    "blockdev-snapshot-sync": snapshot_sync,
}


async def transaction(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do all or nothing; the actions that are there start no jobs that could be grouped."""
    async with parts.graph.change() as change:
        for action in arguments["actions"]:
            kind = action["type"]
            if arguments.get("properties", {}).get("completion-mode") == "grouped":
                raise Error(
                    f"Action '{kind}' does not support transaction property completion-mode = grouped"
                )
            await _ACTIONS[kind](parts, action["data"], change)
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {"transaction": transaction}
