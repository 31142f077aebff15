"""The run states of a machine, and what leads from one to another: one table.

              cont                  stop
    prelaunch -----> running <---------------> paused
        ^               |           cont         |
        |               | switch off             |
        |               v                        |
        +---------- shutdown                     |
        |   reset                                | reset
        +----------------------------------------+

A machine that runs goes on running over a reset.  What the table does not have
leaves the state as it is and tells nobody.  QEMU has more states, for which a
guest, a processor, or another machine to migrate to would be needed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Error


class State(enum.StrEnum):
    """What a machine is doing; the values are those of QAPI's RunState that occur."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"


class Verb(enum.StrEnum):
    """What can be done to a machine."""

    STOP = "stop"
    CONT = "cont"
    RESET = "reset"
    SWITCH_OFF = "switch off"


@dataclass(frozen=True, slots=True)
class Step:
    """From one state to another.

    :param state: the next one.
    :param event: what clients are told, if anything.
    """

    state: State
    event: str | None = None


#: All changes of state.
STEPS: Final[Mapping[tuple[State, Verb], Step]] = {
    (State.PRELAUNCH, Verb.CONT): Step(State.RUNNING, "RESUME"),
    (State.PAUSED, Verb.CONT): Step(State.RUNNING, "RESUME"),
    (State.RUNNING, Verb.STOP): Step(State.PAUSED, "STOP"),
    (State.RUNNING, Verb.SWITCH_OFF): Step(State.SHUTDOWN, "STOP"),
    (State.PAUSED, Verb.RESET): Step(State.PRELAUNCH),
    (State.SHUTDOWN, Verb.RESET): Step(State.PRELAUNCH),
}

#: What is refused instead, in QEMU's words.
_REFUSED: Final[Mapping[tuple[State, Verb], str]] = {
    (State.SHUTDOWN, Verb.CONT): "Resetting the Virtual Machine is required",
}


def step(state: State, verb: Verb) -> Step:
    """Return where a verb leads from a state.

    :raise Error: if that is refused in this state.
    """
    refusal = _REFUSED.get((state, verb))
    if refusal is not None:
        raise Error(refusal)
    return STEPS.get((state, verb), Step(state))
