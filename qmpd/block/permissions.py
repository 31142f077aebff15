"""What a user of a node needs, and what it lets others do meanwhile.

Every edge of the graph carries two sets of permissions: those that the parent
takes on the child, and those that it shares, that is, leaves to the child's
other parents.  Two edges to one child conflict if one takes what the other
does not share.  The four permissions, their meaning and their bits are
QEMU's, because the bits are also the offsets of the locks on an image file.
"""

from __future__ import annotations

import enum


class Permission(enum.Flag):
    """One or several permissions on a node; the bit numbers are those of the image locks."""

    #: What is read is meaningful: nobody changes it behind the reader's back unannounced.
    CONSISTENT_READ = 1
    #: The data may be changed.
    WRITE = 2
    #: Data may be written that reads the same afterwards (a copy on read).
    WRITE_UNCHANGED = 4
    #: The node's size may be changed.
    RESIZE = 8

    @classmethod
    def nothing(cls) -> Permission:
        """The empty set."""
        return cls(0)

    @classmethod
    def everything(cls) -> Permission:
        """All four."""
        return cls(15)


def on_backing(perm: Permission, shared: Permission) -> tuple[Permission, Permission]:
    """What an image takes and shares on its backing image.

    It only reads there, and only if somebody reads the image itself.  Others may
    write to the backing image if all users of the image can live with that.

    :param perm: what the image's own users take, together.
    :param shared: what all of them share.
    """
    others = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    if shared & Permission.WRITE:
        others = Permission.everything()
    return perm & Permission.CONSISTENT_READ, others


#: In the order in which messages and lock bytes name them.
NAMES: tuple[tuple[Permission, str], ...] = (
    (Permission.CONSISTENT_READ, "consistent read"),
    (Permission.WRITE, "write"),
    (Permission.WRITE_UNCHANGED, "write unchanged"),
    (Permission.RESIZE, "resize"),
)


def names(permissions: Permission) -> str:
    """The permissions as a message names them, e.g. ``"write, resize"``."""
    return ", ".join(name for permission, name in NAMES if permission & permissions)
