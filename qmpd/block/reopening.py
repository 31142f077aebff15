"""Giving nodes other options while they are in use (`blockdev-reopen`).

The options are complete: what is left out is as if it had never been given ("discard" alone stays as
it is, as in QEMU).  A child that was made
along with its parent follows it, with the options given inside the parent's; any other child is named, and
naming another one than before replaces it.  All nodes of one command change together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, Final

from qmpd.block.change import Change
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.options import NodeOptions, flattened
from qmpd.errors import Error

#: The options of all nodes, which :class:`NodeOptions` holds, and those that say which node is meant.
_COMMON: Final = frozenset(
    {
        "active",
        "auto-read-only",
        "cache",
        "detect-zeroes",
        "discard",
        "driver",
        "node-name",
        "read-only",
    }
)

#: The children that can be replaced.
_REPLACEABLE: Final = ("file", "backing")

#: The nodes to open anew with their new options, parents before the children that follow them.
Plan = dict[Node, tuple[Mapping[str, Any], NodeOptions]]


async def reopen(graph: Graph, entries: Iterable[Mapping[str, Any]]) -> None:
    """Give nodes other options.

    :param entries: BlockdevOptions of each, validated, in QAPI's names.
    :raise Error: if any of them can't have them; then nothing has changed.
    """
    async with graph.change() as change:
        plan: Plan = {}
        for options in entries:
            if "node-name" not in options:
                raise Error("node-name not specified")
            node = graph.find(options["node-name"])
            if node is None:
                raise Error(f"Failed to find node with node-name='{options['node-name']}'")
            if node in plan:
                options = {**plan[node][0], **options}
            _include(plan, node, options, NodeOptions.parse(options))
        await _carry_out(graph, plan, change)


async def set_read_only(graph: Graph, node: Node, read_only: bool, change: Change) -> None:
    """Make a node read-only or not, and with it the children that follow it.

    :raise Error: if somebody writes to it, or it can't be written to.
    """
    plan: Plan = {}
    _include(plan, node, node.options, node.node_options.with_read_only(read_only))
    await _carry_out(graph, plan, change)


def _include(plan: Plan, node: Node, options: Mapping[str, Any], node_options: NodeOptions) -> None:
    """Take `node` into the plan, and the children that follow it."""
    if "discard" not in options:
        node_options = node_options.with_discard(node.node_options.discard)
    plan[node] = options, node_options
    for role, edge in node.children.items():
        child = edge.child
        given = options.get(role, child.name)
        if child.inherits_from is not node or given is None:
            continue
        if isinstance(given, Mapping):
            own = given
        elif given == child.name or options is node.options:
            own = child.options
        else:
            continue
        _include(plan, child, own, NodeOptions.parse(own, node_options.for_child(role)))


async def _carry_out(graph: Graph, plan: Plan, change: Change) -> None:
    await change.hold(graph.drained(*plan))
    for node in plan:
        try:
            await node.flush()
            await node.settle()
        except OSError as error:
            raise Error(f"Error flushing drive: {error.strerror}") from None
    concerned = [*plan, *(edge.child for node in plan for edge in node.children.values())]
    change.on_failure(lambda: graph.settle(*concerned))
    frozen = [node for node, (_, options) in plan.items() if options.read_only and not node.read_only]
    for node, (options, node_options) in plan.items():
        if options is not node.options:
            _check(node, options)
            concerned += _replace_children(graph, node, options, change)
        node_options.check()
        await node.reopen(options, node_options, change)
    graph.settle(*concerned, frozen=frozen)


def _check(node: Node, options: Mapping[str, Any]) -> None:
    """Refuse options that can't change.

    :raise Error: it names the first one.
    """
    for option, now in (("driver", node.driver), ("node-name", node.name)):
        if options.get(option, now) != now:
            raise Error(f"Cannot change the option '{option}'")
    for option in [*options, *node.options]:
        follows = option in node.children and isinstance(options.get(option), Mapping)
        if option in _COMMON or option in _REPLACEABLE or follows:
            continue
        old, new = (
            flattened({option: given[option]}) if option in given else {} for given in (node.options, options)
        )
        for name in [*new, *old]:
            if name not in new:
                if not _is_among(name, node.resettable_options):
                    raise Error(f"Option '{name}' cannot be reset to its default value")
            elif (name not in old or new[name] != old[name]) and not _is_among(name, node.changeable_options):
                raise Error(f"Cannot change the option '{name}'")


def _is_among(name: str, options: Set[str]) -> bool:
    """Whether an option, or what it is a member of, is one of these."""
    return name in options or name.partition(".")[0] in options


def _replace_children(graph: Graph, node: Node, options: Mapping[str, Any], change: Change) -> Iterator[Node]:
    """Put other nodes into the roles where the options name others than before.

    :returns: the new children.
    :raise Error: if one is not there or can't be had.
    """
    if node.supports_backing and "backing" not in options and (node.backing or node.backing_filename):
        raise Error(f"backing is missing for '{node.name}'")
    for role in _REPLACEABLE:
        if role not in options:
            continue
        now = node.children[role].child if role in node.children else None
        given = options[role]
        if isinstance(given, Mapping):
            if now is None or now.inherits_from is not node:
                raise Error(f"Cannot change the option '{role}.driver'")
            continue
        # The empty string is an old way to write null.
        wanted = graph.find(given) if given else None
        if given and wanted is None:
            raise Error(f"Cannot find device='' nor node-name='{given}'")
        if wanted is not now:
            graph.swap_child(node, role, wanted, change)
            if wanted is not None:
                yield wanted
