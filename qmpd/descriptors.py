"""Descriptors that clients pass: unclaimed, under a name, or in a set.

A descriptor comes with a client's bytes and is unclaimed at first (:class:`Passed`).
`getfd` gives it a name (:class:`NamedDescriptors`), by which the monitor it was sent
to finds it once: whoever uses it takes it away.  `add-fd` puts it into a set
(:class:`FdSets`), which is the whole daemon's; `/dev/fdset/N` is then a file name
that stands for whichever descriptor of set N was opened in the way that is wanted,
and can be opened as often as one likes.

What is kept is bounded (:class:`Allowance`): a client that passes one descriptor
after another must not leave the daemon without any for its disks and other clients.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qmpd.errors import Error
from qmpd.sockets import decimal

#: How the names of sets' descriptors begin.
PREFIX: Final = "/dev/fdset/"

#: The part of the process's descriptors that passed ones may be.
_SHARE: Final = 4
#: What has to be the same in how a descriptor was opened and how it is to be used.
_MODE: Final = os.O_ACCMODE | os.O_DIRECT
#: Standard input, output and error output come before the descriptors that may be adopted.
_LAST_STANDARD: Final = 2
_INT_MAX: Final = (1 << 31) - 1
_DIGITS: Final = "0123456789"


class Allowance:
    """How many passed descriptors may be kept, all names and sets together.

    :param limit: by default a quarter of what the process may have open.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE if limit is None else limit
        self._kept = 0

    def keep(self, descriptor: int) -> None:
        """Count one more.

        :raise Error: if there are too many; it is closed then.
        """
        if self._kept >= self._limit:
            os.close(descriptor)
            raise Error(f"No more than {self._limit} file descriptors that were passed can be kept")
        self._kept += 1

    def give_back(self) -> None:
        """Count one less."""
        self._kept -= 1


class Passed:
    """The descriptor that a client has passed and no command has claimed: the latest, if any."""

    def __init__(self) -> None:
        self._descriptor = -1

    def __bool__(self) -> bool:
        return self._descriptor >= 0

    def put(self, descriptor: int) -> None:
        """Keep it in place of the one before, which nobody has claimed."""
        self.close()
        self._descriptor = descriptor

    def claim(self) -> int:
        """Take it away.

        :raise Error: if there is none.
        """
        if not self:
            raise Error("No file descriptor supplied via SCM_RIGHTS")
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Nobody will claim it."""
        if self:
            os.close(self.claim())


class NamedDescriptors:
    """The descriptors that clients of one monitor have given names; they stay when a client goes.

    :param allowance: how many there may be.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self._allowance = allowance or Allowance()
        self._all: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def add(self, name: str, descriptor: int) -> None:
        """Give a descriptor a name; the one that had it is closed.

        :raise Error: if it can't have that name; it is closed then.
        """
        if name[:1] in _DIGITS and name:
            # It would be taken for a descriptor's number.
            os.close(descriptor)
            raise Error("Parameter 'fdname' expects a name not starting with a digit")
        if name in self._all:
            self.remove(name)
        self._allowance.keep(descriptor)
        self._all[name] = descriptor

    def take(self, name: str) -> int:
        """Take a descriptor away, to use it.

        :raise Error: if there is none of that name.
        """
        if name not in self._all:
            raise Error(f"File descriptor named '{name}' has not been found")
        self._allowance.give_back()
        return self._all.pop(name)

    def remove(self, name: str) -> None:
        """Close a descriptor.

        :raise Error: if there is none of that name.
        """
        if name not in self._all:
            raise Error(f"File descriptor named '{name}' not found")
        os.close(self.take(name))

    def close(self) -> None:
        """Close all of them."""
        for name in list(self._all):
            self.remove(name)


@dataclass(frozen=True)
class ClientDescriptors:
    """What a command may want to know of the client that sent it.

    :param passed: what came along with its bytes.
    :param named: those of the monitor that it talks to.
    """

    passed: Passed = field(default_factory=Passed)
    named: NamedDescriptors = field(default_factory=NamedDescriptors)


@dataclass
class _Set:
    """One set.

    :param members: what somebody wrote beside each descriptor, oldest first; None for nothing.
    :param users: how many copies of its descriptors are in use.
    """

    members: dict[int, str | None] = field(default_factory=dict)
    users: int = 0


class FdSets:
    """The sets of descriptors.  One that has no descriptor and no user is gone.

    :param allowance: how many descriptors there may be.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self._allowance = allowance or Allowance()
        self._sets: dict[int, _Set] = {}
        #: What `adopt` copied; the command line may name one of these again.
        self._adopted: set[int] = set()
        #: The set from which each descriptor that is in use was copied.
        self._used: dict[int, int] = {}

    # -- what clients do

    def add(self, descriptor: int, number: int | None = None, opaque: str | None = None) -> Mapping[str, int]:
        """Put a descriptor into a set, which is made if need be.

        :param number: of the set; None for the lowest that is free.
        :param opaque: whatever somebody wants to remember of it.
        :return: AddfdInfo.
        :raise Error: if there can't be such a set, or no further descriptor; it is closed then.
        """
        if number is not None and number < 0:
            os.close(descriptor)
            raise Error("Parameter 'fdset-id' expects a non-negative value")
        self._allowance.keep(descriptor)
        if number is None:
            number = next(free for free in range(len(self._sets) + 1) if free not in self._sets)
        self._sets.setdefault(number, _Set()).members[descriptor] = opaque
        return {"fd": descriptor, "fdset-id": number}

    def adopt(self, descriptor: int, number: int, opaque: str | None = None) -> None:
        """Put a copy of a descriptor that the process was started with into a set.

        :raise Error: if it is not one.
        """
        if descriptor <= _LAST_STANDARD:
            raise Error("fd cannot be a standard I/O stream")
        try:
            # What the process itself has opened closes on exec.
            inherited = not fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            copy = os.dup(descriptor) if inherited else -1
        except (OSError, OverflowError):
            copy = -1
        if copy < 0:
            raise Error("fd is not valid or already in use")
        self.add(copy, number, opaque)
        self._adopted.add(descriptor)

    def close_adopted(self) -> None:
        """Close what `adopt` has copied: from now on only the copies count."""
        for descriptor in self._adopted:
            os.close(descriptor)
        self._adopted.clear()

    def remove(self, number: int, descriptor: int | None = None) -> None:
        """Close a descriptor of a set, or all of them; what was copied from them stays in use.

        :raise Error: if there is no such set or descriptor.
        """
        named = f"fdset-id:{number}" if descriptor is None else f"fdset-id:{number}, fd:{descriptor}"
        members = self._sets[number].members if number in self._sets else None
        if members is None or (descriptor is not None and descriptor not in members):
            raise Error(f"File descriptor named '{named}' not found")
        for one in list(members) if descriptor is None else [descriptor]:
            del members[one]
            os.close(one)
            self._allowance.give_back()
        self._forget_if_empty(number)

    def query(self) -> list[dict[str, Any]]:
        """All of them, the highest number first (FdsetInfo)."""
        return [
            {
                "fds": [
                    {"fd": descriptor} if opaque is None else {"fd": descriptor, "opaque": opaque}
                    for descriptor, opaque in self._sets[number].members.items()
                ],
                "fdset-id": number,
            }
            for number in sorted(self._sets, reverse=True)
        ]

    # -- what disks do

    def open(self, filename: str, flags: int, *, same_as: int | None = None) -> int:
        """Copy the descriptor of a set that was opened as is wanted.

        :param filename: begins with :data:`PREFIX`.
        :param flags: as for open(2); the access mode and O_DIRECT have to be the descriptor's.
        :param same_as: only a descriptor of the same file as this one will do.
        :return: what is to be closed with :meth:`close`.  It shares its open file description with
            others: locks and the file's offset (open(2)).
        :raise Error: if there is no such set or descriptor.
        """
        number = _set_number(filename)
        if number not in self._sets:
            raise Error(f"Failed to find fdset {filename}")
        # The newest first, as in QEMU.
        for descriptor in reversed(self._sets[number].members):
            opened = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if (opened ^ flags) & _MODE or (same_as is not None and not _is_same_file(descriptor, same_as)):
                continue
            if opened & os.O_PATH:
                # It stands for a name, and is not open.
                raise Error(f"Failed to dup() given file descriptor fd={descriptor}")
            try:
                copy = os.dup(descriptor)
            except OSError as error:
                raise Error(f"Could not open '{filename}': {error.strerror}") from None
            self._sets[number].users += 1
            self._used[copy] = number
            return copy
        raise Error(f"Failed to find file descriptor with matching flags=0x{flags:x}")

    def close(self, descriptor: int) -> None:
        """Close a descriptor, whether :meth:`open` copied it or not."""
        number = self._used.pop(descriptor, None)
        os.close(descriptor)
        if number is not None:
            self._sets[number].users -= 1
            self._forget_if_empty(number)

    def _forget_if_empty(self, number: int) -> None:
        if not self._sets[number].members and not self._sets[number].users:
            del self._sets[number]

    def close_all(self) -> None:
        """Close what was put here."""
        self.close_adopted()
        for number in list(self._sets):
            self.remove(number)


def _set_number(filename: str) -> int:
    """Which set a file name means.

    :raise Error: if it is no number of a set.
    """
    number = decimal(filename.removeprefix(PREFIX))
    if number is None or not 0 <= number <= _INT_MAX:
        raise Error(f"Could not parse fdset {filename}")
    return number


def _is_same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))
