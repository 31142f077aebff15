"""Groups of disks that share limits, and the requests that wait for them.

A disk is a member of one group at most, and a group is there as long as it has
members, or an object of that name that was made for it.  What the limits are
is the group's: whoever changes them for one member does so for all.

Requests wait in their order, reads apart from writes, for one may be limited
and the other not.  The members of a group take turns, so that a disk with a
long queue does not keep the others waiting; where reads and writes wait for
the same limit, they take turns as well.  Nobody but these requests waits: a
group has one timer, and the event loop is free meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from qmpd.block.throttling import UNLIMITED, Direction, Throttle, are_limiting, check
from qmpd.errors import Error

#: A shorter time than this, in seconds, is not worth a timer: it is what rounding leaves.
_NO_TIME: Final = 1e-9

#: A request that waits, and its size in bytes.
_Waiting = tuple[asyncio.Future[None], int]


class Timer(Protocol):
    """What is to happen later, and can be called off."""

    def cancel(self) -> None:
        """Let it not happen."""


class Clock(Protocol):
    """What an event loop has of a clock."""

    def time(self) -> float:
        """The time, in seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` in `delay` seconds."""


class Member:
    """A disk's place in a group.

    :param group: whoever constructs it, joins it.
    """

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        group.members.append(self)

    async def admit(self, direction: Direction, size: int) -> None:
        """Return when a request of `size` bytes may begin."""
        await self.group.admit(self, direction, size)

    def leave(self) -> None:
        """Be no member any more; what waits goes on at once."""
        self.group.leave(self)


class ThrottleGroup:
    """Disks that share limits."""

    def __init__(self, groups: ThrottleGroups, name: str) -> None:
        self._groups = groups
        self.name = name
        self.members: list[Member] = []
        #: Somebody has made an object for it.
        self.has_object = False
        self._limits = dict(UNLIMITED)
        self._throttle: Throttle | None = None
        self._timer: Timer | None = None
        #: The requests that wait, by direction and member, the member first whose turn it is.
        self._queues: dict[Direction, OrderedDict[Member, deque[_Waiting]]] = {
            direction: OrderedDict() for direction in Direction
        }
        #: The directions, the one first whose turn it is.
        self._turns = list(Direction)

    @property
    def limits(self) -> Mapping[str, int]:
        """ThrottleLimits, all of them."""
        return self._limits

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Have other limits from now on; what was done before does not count any more.

        :param limits: all of them, checked.
        """
        self._limits = dict(limits)
        self._throttle = Throttle(limits, self._groups.clock.time()) if are_limiting(limits) else None
        self._go_on()

    async def admit(self, member: Member, direction: Direction, size: int) -> None:
        """Return when a request of `member`'s may begin."""
        if self._throttle is None and not self._queues[direction]:
            return
        turn = asyncio.get_running_loop().create_future()
        self._queues[direction].setdefault(member, deque()).append((turn, size))
        self._go_on()
        if not turn.done():
            await turn

    def leave(self, member: Member) -> None:
        """Let a member go, and what of it waits go on."""
        self.members.remove(member)
        self.release(member)
        self.let_go()

    def release(self, member: Member) -> None:
        """Let all go on that waits of a member, whatever the limits are."""
        for queues in self._queues.values():
            for turn, _ in queues.pop(member, ()):
                if not turn.done():
                    turn.set_result(None)
        self._go_on()

    def let_go(self) -> None:
        """Be forgotten if nobody needs the group."""
        if not self.members and not self.has_object:
            self._groups.forget(self)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(len(queue) for queues in self._queues.values() for queue in queues.values())

    def _go_on(self) -> None:
        """Let requests begin as far as the limits allow, and come back for the next one when it may."""
        clock = self._groups.clock
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while directions := [each for each in self._turns if self._queues[each]]:
            if self._throttle is None:
                self._begin(directions[0])
                continue
            now = clock.time()
            # Of equal ones `min` takes the first.
            delay, direction = min(
                ((self._throttle.delay(each, now), each) for each in directions), key=lambda pair: pair[0]
            )
            if delay > _NO_TIME:
                self._timer = clock.call_later(delay, self._go_on)
                return
            size = self._begin(direction)
            if size is not None:
                self._throttle.begin(direction, size, now)
                self._turns.sort(key=lambda each: each is direction)

    def _begin(self, direction: Direction) -> int | None:
        """Let the next request of a direction begin; returns its size, or None if it has been given up."""
        queues = self._queues[direction]
        member, queue = next(iter(queues.items()))
        turn, size = queue.popleft()
        if not queue:
            del queues[member]
        if turn.done():
            return None
        if queue:
            queues.move_to_end(member)
        turn.set_result(None)
        return size


class ThrottleGroups:
    """The groups by name.

    :param clock: None for the one of the event loop that runs when it is needed.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._groups: dict[str, ThrottleGroup] = {}

    @property
    def clock(self) -> Clock:
        """What tells the time."""
        return asyncio.get_running_loop() if self._clock is None else self._clock

    def create(self, name: str) -> ThrottleGroup:
        """Make a group for an object of this name.

        :raise Error: if there is one with this name.
        """
        if name in self._groups:
            raise Error("A group with this name already exists")
        group = self.find(name)
        group.has_object = True
        return group

    def find(self, name: str) -> ThrottleGroup:
        """The group with this name, made if it is not there yet."""
        return self._groups.setdefault(name, ThrottleGroup(self, name))

    def existing(self, name: str) -> ThrottleGroup:
        """The group with this name.

        :raise Error: if there is none.
        """
        if name not in self._groups:
            raise Error(f"Throttle group '{name}' does not exist")
        return self._groups[name]

    def forget(self, group: ThrottleGroup) -> None:
        """Take a group out that nobody needs."""
        self._groups.pop(group.name, None)

    def limit(self, member: Member | None, limits: Mapping[str, int], name: str) -> Member | None:
        """Give a disk limits, or take them away if there are none among them.

        :param member: its place so far, if it has one.
        :param name: the group to be in.
        :return: its place from now on.
        :raise Error: if the limits make no sense; then nothing has changed.
        """
        check(limits)
        if member is not None and (member.group.name != name or not are_limiting(limits)):
            member.leave()
            member = None
        if not are_limiting(limits):
            return None
        member = member or Member(self.find(name))
        member.group.set_limits(limits)
        return member
