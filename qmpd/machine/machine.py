"""A machine's life: it runs, stops, starts over and is switched off, but computes nothing.

`run_state` has the states; here is what comes with them: the events that are no
change of state, the power button, and whether the process ends with the machine.

There is no guest that would notice the power button and take its time, so a
machine that runs switches itself off as soon as it is pressed, and one that was
stopped, when it goes on; one that was never started does not care.  The SHUTDOWN
comes a little after the reply of `system_powerdown`, as a guest's would, because
clients begin to wait for it then.  The type ``none`` has no button: as in QEMU the
command is told of, and nothing else happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import UUID

from qmpd.errors import Error
from qmpd.machine import types
from qmpd.machine.config import MachineConfig
from qmpd.machine.run_state import State, Verb, step
from qmpd.qom.devices import Devices

Emit = Callable[[str, dict[str, Any]], None]

#: Seconds between the power button and the machine's end.
_POWER_OFF_DELAY: Final = 0.02


class Machine:
    """The machine of an emulator.

    :param config: what it is to be.
    :param devices: what is plugged into it.
    :param emit: sends an event to clients.
    :param end: ends the process; called when the machine is switched off for good.
    """

    def __init__(self, config: MachineConfig, devices: Devices, emit: Emit, end: Callable[[], None]) -> None:
        self.config = config
        self.type = types.find(config.type)
        #: All zeros if it was given none.
        self.uuid = UUID(config.uuid) if config.uuid is not None else UUID(int=0)
        #: Bytes, on paper.
        self.memory = self.type.memory_of(config.memory)
        self._devices = devices
        self._emit = emit
        self._end = end
        self._state = State.RUNNING if config.started else State.PRELAUNCH
        #: What is done when something happens to it (the arguments of `set-action`).
        self._actions = {
            "reboot": "shutdown" if config.no_reboot else "reset",
            "shutdown": "pause" if config.no_shutdown else "poweroff",
        }
        #: The power button was pressed, and the machine has not been switched off yet.
        self._button_pressed = False
        self._timer: asyncio.TimerHandle | None = None
        self._migration_capabilities = {"events": False}

    # -- run state

    def status(self) -> dict[str, Any]:
        """The run state (StatusInfo)."""
        return {"running": self._state is State.RUNNING, "status": str(self._state)}

    def stop(self) -> None:
        """Stop, if it runs."""
        self._go(Verb.STOP)

    def cont(self) -> None:
        """Go on, if it does not run; disks forget that requests have failed.

        :raise Error: if it was switched off and not started over since.
        """
        self._go(Verb.CONT)
        self._devices.forget_failures()
        self._notice_button()

    def reset(self) -> None:
        """Start over, as `system_reset` does, or be switched off if that is what a reset means."""
        if self._actions["reboot"] == "shutdown":
            self._switch_off("host-qmp-system-reset")
            return
        # Whoever starts over has not noticed the button.
        self._forget_button()
        self._devices.reset()
        self._go(Verb.RESET)

    def power_down(self) -> None:
        """Press the power button."""
        self._emit("POWERDOWN", {})
        # A machine that was never started has nothing in it yet that would find out later.
        if self.type.has_power_button and self._state is not State.PRELAUNCH:
            self._button_pressed = True
            self._notice_button()

    def set_actions(self, actions: Mapping[str, str]) -> None:
        """Say what is done when something happens.

        :param actions: the arguments of `set-action`; those about guests that crash can't matter.
        """
        self._actions.update(actions)

    def tell_shutdown(self, reason: str, *, guest: bool = False) -> None:
        """Tell clients that the machine is switched off.

        :param reason: a ShutdownCause.
        :param guest: the machine has done it itself.
        """
        self._forget_button()
        self._emit("SHUTDOWN", {"guest": guest, "reason": reason})

    def close(self) -> None:
        """Do nothing more by itself."""
        self._forget_button()

    def _go(self, verb: Verb) -> None:
        found = step(self._state, verb)
        self._state = found.state
        if found.event is not None:
            self._emit(found.event, {})

    def _notice_button(self) -> None:
        if self._button_pressed and self._state is State.RUNNING and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_POWER_OFF_DELAY, self._obey_button)

    def _obey_button(self) -> None:
        self._timer = None
        # It may have been stopped in the meantime.
        if self._state is State.RUNNING:
            self._switch_off("guest-shutdown", guest=True)

    def _forget_button(self) -> None:
        self._button_pressed = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _switch_off(self, reason: str, *, guest: bool = False) -> None:
        self.tell_shutdown(reason, guest=guest)
        if self._actions["shutdown"] == "poweroff":
            self._end()
        else:
            self._go(Verb.SWITCH_OFF)

    # -- what else it is asked

    def use_memory(self, size: int) -> None:
        """Take an object for its memory.

        :param size: the object's, in bytes.
        :raise Error: if it was told to have more or less.
        """
        if self.config.memory not in (None, size):
            raise Error("Machine memory size does not match the size of the memory backend")
        self.memory = size

    def set_migration_capabilities(self, wanted: Iterable[Mapping[str, Any]]) -> None:
        """Remember what migrations are to do.

        :param wanted: MigrationCapabilityStatus, validated.
        """
        self._migration_capabilities.update((each["capability"], each["state"]) for each in wanted)

    def migration_capabilities(self) -> list[dict[str, Any]]:
        """What migrations are to do (MigrationCapabilityStatus)."""
        return [{"state": state, "capability": name} for name, state in self._migration_capabilities.items()]
