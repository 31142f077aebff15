"""A machine's run state: it runs, stops, starts over and is switched off, but computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import UUID

from qmpd.machine.config import MachineConfig
from qmpd.qom.devices import Devices

Emit = Callable[[str, dict[str, Any]], None]


class Machine:
    """The machine of an emulator.

    :param config: what it is to be.
    :param devices: what is plugged into it.
    :param emit: sends an event to clients.
    :param end: ends the process; called when the machine is switched off for good.
    """

    def __init__(self, config: MachineConfig, devices: Devices, emit: Emit, end: Callable[[], None]) -> None:
        self.config = config
        #: All zeros if it was given none.
        self.uuid = UUID(config.uuid) if config.uuid is not None else UUID(int=0)
        self._migration_capabilities = {"events": False}
        self._devices = devices
        self._emit = emit
        self._end = end
        self._state = "running" if config.started else "prelaunch"
        #: The power button was pressed while nobody could notice.
        self._button_pressed = False

    def status(self) -> dict[str, Any]:
        """The run state (StatusInfo)."""
        return {"status": self._state, "running": self._state == "running"}

    def stop(self) -> None:
        """Stop, if it runs."""
        if self._state == "running":
            self._state = "paused"
            self._emit("STOP", {})

    def cont(self) -> None:
        """Go on, if it does not run."""
        if self._state != "running":
            self._state = "running"
            self._emit("RESUME", {})
            if self._button_pressed:
                self._switch_off()

    def power_down(self) -> None:
        """Press the power button."""
        self._emit("POWERDOWN", {})
        self._button_pressed = True
        if self._state == "running":
            self._switch_off()

    def reset(self) -> None:
        """Start over, as `system_reset` does."""
        self._devices.reset()

    def shut_down(self, reason: str, *, guest: bool = False) -> None:
        """Tell clients that the machine is switched off.

        :param reason: a ShutdownCause.
        """
        self._emit("SHUTDOWN", {"guest": guest, "reason": reason})

    def set_migration_capabilities(self, wanted: Iterable[Mapping[str, Any]]) -> None:
        """Remember what migrations are to do.

        :param wanted: MigrationCapabilityStatus, validated.
        """
        self._migration_capabilities.update((each["capability"], each["state"]) for each in wanted)

    def migration_capabilities(self) -> list[dict[str, Any]]:
        """What migrations are to do (MigrationCapabilityStatus)."""
        return [{"state": state, "capability": name} for name, state in self._migration_capabilities.items()]

    def _switch_off(self) -> None:
        self._button_pressed = False
        self.shut_down("guest-shutdown", guest=True)
        if self.config.no_shutdown:
            self._state = "shutdown"
            self._emit("STOP", {})
        else:
            self._end()
