"""The options that every node has, and how an inline child gets its parent's.

`blockdev-add` takes them under QAPI's names (BlockdevOptions); a child that is
defined inside its parent inherits what it does not say itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qmpd.errors import Error


@dataclass(frozen=True)
class NodeOptions:
    """Options of a node that do not depend on its driver."""

    read_only: bool = False
    auto_read_only: bool = False
    direct: bool = False
    no_flush: bool = False
    #: "ignore": discards are dropped; "unmap": they are passed on.
    discard: str = "ignore"
    #: "off", "on" (zeroes are written by the cheapest way) or "unmap" (and their space given back).
    detect_zeroes: str = "off"
    force_share: bool = False
    active: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any], inherited: NodeOptions | None = None) -> NodeOptions:
        """The common options in `options`.

        :param inherited: the parent's, if the node is defined inside it.
            Discards are always passed down to such a child: its parent has
            decided about them already.
        """
        base = inherited or cls()
        cache = options.get("cache", {})
        return cls(
            read_only=options.get("read-only", base.read_only),
            auto_read_only=options.get("auto-read-only", base.auto_read_only),
            direct=cache.get("direct", base.direct),
            no_flush=cache.get("no-flush", base.no_flush),
            discard=options.get("discard", "unmap" if inherited else base.discard),
            detect_zeroes=options.get("detect-zeroes", "off"),
            force_share=options.get("force-share", base.force_share),
            active=options.get("active", True),
        )

    def for_child(self, role: str) -> NodeOptions:
        """What a child that is defined inside this node inherits: nobody writes to a backing image."""
        return replace(self, read_only=True, auto_read_only=False) if role == "backing" else self

    def with_read_only(self, read_only: bool) -> NodeOptions:
        """The same, but nobody writes, or everybody may."""
        return replace(self, read_only=read_only)

    def with_discard(self, discard: str) -> NodeOptions:
        """The same, with discards "ignore"d or passed on ("unmap")."""
        return replace(self, discard=discard)

    def check(self) -> None:
        """Refuse combinations that make no sense.

        :raise Error: in QEMU's words.
        """
        if not self.active:
            raise Error("Inactive nodes are not supported: 'active' must be true")
        if self.force_share and not self.read_only:
            raise Error("force-share=on can only be used with read-only images")
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise Error(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )


def flattened(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by names in which a dot goes before a member: ``"encrypt.format"``."""

    def entries(prefix: str, members: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in members.items():
            if isinstance(value, Mapping):
                yield from entries(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    return dict(entries("", options))
