"""Commands of `schema/luks.json`: what only qmpd does for LUKS headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.block.keyslot_care import convert_header, query_keyslots, restore_header, save_header
from qmpd.block.keyslot_holder import keyslot_holder
from qmpd.commands.parts import Handler, Parts


async def query_luks_keyslots(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tell what a node's keyslots are like."""
    return await query_keyslots(parts.graph.lookup(None, arguments["node-name"]))


def luks_header_backup(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a job that saves a header."""
    node = keyslot_holder(parts.graph.lookup(None, arguments["node-name"]))
    parts.jobs.start(
        arguments["job-id"],
        "__org.qmpd_luks-header-backup",
        lambda job: save_header(node, arguments["filename"]),
    )
    return {}


def luks_header_restore(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a job that puts a header back."""
    node = keyslot_holder(parts.graph.lookup(None, arguments["node-name"]))
    filename, secret, force = (
        arguments.get("filename"),
        arguments.get("secret"),
        arguments.get("force", False),
    )
    parts.jobs.start(
        arguments["job-id"],
        "__org.qmpd_luks-header-restore",
        lambda job: restore_header(node, filename, secret=secret, force=force, commit=job.commit),
    )
    return {}


def luks_convert(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a job that makes a header one of another version."""
    version = {"luks1": 1, "luks2": 2}[arguments["type"]]
    parts.jobs.start(
        arguments["job-id"],
        "__org.qmpd_luks-convert",
        lambda job: convert_header(
            parts.graph, arguments["file"], version, backup=arguments["backup"], commit=job.commit
        ),
    )
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "__org.qmpd_query-luks-keyslots": query_luks_keyslots,
    "__org.qmpd_luks-header-backup": luks_header_backup,
    "__org.qmpd_luks-header-restore": luks_header_restore,
    "__org.qmpd_luks-convert": luks_convert,
}
