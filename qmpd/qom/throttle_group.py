"""Throttle groups: limits that several disks share.

The object holds a group of `qmpd.block.throttle_groups`, which disks join by
its name.  A limit is set either as a member of ``limits``, at any time, or by a
property of its own with the prefix ``x-``, while the object is made.  What a
client sets for a disk of the group changes the object's limits too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpd.block.throttle_groups import ThrottleGroup as Group
from qmpd.block.throttling import UNLIMITED, check, check_made_with, merged
from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable

if TYPE_CHECKING:
    from qmpd.qom.tree import ObjectTree

_PREFIX: Final = "x-"


class ThrottleGroup(UserCreatable):
    """The object type "throttle-group"."""

    qom_type = "throttle-group"
    struct = "ThrottleGroupProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        limits = dict(UNLIMITED)
        for name in options:
            if name.startswith(_PREFIX):
                check_made_with(name, options[name])
                limits[name.removeprefix(_PREFIX)] = options[name]
        self._wanted = merged(limits, options["limits"]) if "limits" in options else limits
        self._group: Group | None = None

    async def complete(self, options: Mapping[str, Any], tree: ObjectTree) -> None:
        """Check the limits together, and make the group.

        :raise Error: if they contradict each other, or there is a group of this name.
        """
        group = tree.throttle_groups.create(self.name)
        try:
            check(self._wanted)
        except Error:
            group.has_object = False
            group.let_go()
            raise
        group.set_limits(self._wanted)
        self._group = group

    @property
    def in_use(self) -> bool:
        """Whether a disk is in the group."""
        return self._group is not None and bool(self._group.members)

    def removed(self) -> None:
        """Let go of the group."""
        if self._group is not None:
            self._group.has_object = False
            self._group.let_go()

    @property
    def _limits(self) -> Mapping[str, int]:
        return self._wanted if self._group is None else self._group.limits

    def get(self, name: str) -> Any:
        """All limits, or one."""
        return dict(self._limits) if name == "limits" else self._limits[name.removeprefix(_PREFIX)]

    def check_settable(self, name: str) -> None:
        """Refuse the members with the prefix: they are for making the group."""
        if name != "limits":
            raise Error("Property cannot be set after initialization")

    def set(self, name: str, value: Any) -> None:
        """Change the limits that `value` names.

        :raise Error: if they contradict each other.
        """
        assert self._group is not None, "nobody sees the object before it is complete"
        self._group.set_limits(merged(self._limits, value))
