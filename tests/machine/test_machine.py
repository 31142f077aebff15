from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.errors import Error
from qmpd.machine.config import MachineConfig
from qmpd.machine.machine import Machine
from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree

pytestmark = pytest.mark.asyncio

RESET = ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
OFF = ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
ENDED = ("the process ends", {})


class Watched:
    """A machine, and what it has told; the end of its process counts as told."""

    def __init__(self, **config: Any) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        tree = ObjectTree(load(schema_directory(), SYSTEM_SCHEMA))
        devices = Devices(Graph(DRIVERS, secrets=tree.secret_bytes), tree, self._tell)
        self.machine = Machine(MachineConfig(**config), devices, self._tell, lambda: self._tell(*ENDED))

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        self.told.append((name, data))

    @property
    def state(self) -> str:
        status: str = self.machine.status()["status"]
        return status

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """What was told since the last time."""
        told, self.told = self.told, []
        return told

    async def until_told(self, last: str) -> list[tuple[str, dict[str, Any]]]:
        """Wait until something was told; returns all that was."""
        async with asyncio.timeout(30):
            while not any(name == last for name, _ in self.told):
                await asyncio.sleep(0.001)
        return self.take()

    async def long_enough_for_the_button(self) -> None:
        """Wait until a machine that was asked later has been switched off by its button."""
        other = Watched()
        other.machine.power_down()
        await other.until_told(ENDED[0])
        await asyncio.sleep(0)


async def test_a_machine_runs_unless_it_is_to_wait() -> None:
    assert Watched().machine.status() == {"status": "running", "running": True}
    assert Watched(started=False).machine.status() == {"status": "prelaunch", "running": False}


async def test_stop_and_cont_tell_only_of_what_changes() -> None:
    watched = Watched(started=False)
    watched.machine.stop()
    assert (watched.state, watched.take()) == ("prelaunch", [])
    watched.machine.cont()
    watched.machine.cont()
    assert (watched.state, watched.take()) == ("running", [("RESUME", {})])
    watched.machine.stop()
    watched.machine.stop()
    assert (watched.state, watched.take()) == ("paused", [("STOP", {})])


async def test_a_reset_leads_back_before_the_start_unless_the_machine_runs() -> None:
    watched = Watched()
    watched.machine.reset()
    assert (watched.state, watched.take()) == ("running", [RESET])
    watched.machine.stop()
    watched.take()
    watched.machine.reset()
    assert (watched.state, watched.take()) == ("prelaunch", [RESET])


async def test_the_power_button_ends_a_machine_that_runs_after_the_reply() -> None:
    watched = Watched()
    watched.machine.power_down()
    assert (watched.state, watched.take()) == ("running", [("POWERDOWN", {})])
    assert await watched.until_told(ENDED[0]) == [OFF, ENDED]


async def test_the_power_button_leaves_the_process_with_no_shutdown() -> None:
    watched = Watched(no_shutdown=True)
    watched.machine.power_down()
    assert await watched.until_told("STOP") == [("POWERDOWN", {}), OFF, ("STOP", {})]
    assert watched.state == "shutdown"
    with pytest.raises(Error, match="Resetting"):
        watched.machine.cont()
    assert (watched.state, watched.take()) == ("shutdown", [])
    watched.machine.reset()
    watched.machine.cont()
    assert (watched.state, watched.take()) == ("running", [RESET, ("RESUME", {})])


async def test_a_button_pressed_twice_switches_off_once() -> None:
    watched = Watched(no_shutdown=True)
    watched.machine.power_down()
    watched.machine.power_down()
    await watched.until_told("STOP")
    await watched.long_enough_for_the_button()
    assert watched.take() == []


async def test_a_button_pressed_while_stopped_is_obeyed_when_the_machine_goes_on() -> None:
    watched = Watched()
    watched.machine.stop()
    watched.machine.power_down()
    await watched.long_enough_for_the_button()
    assert (watched.state, watched.take()) == ("paused", [("STOP", {}), ("POWERDOWN", {})])
    watched.machine.cont()
    assert await watched.until_told(ENDED[0]) == [("RESUME", {}), OFF, ENDED]


async def test_a_machine_that_was_never_started_does_not_care_for_its_button() -> None:
    watched = Watched(started=False)
    watched.machine.power_down()
    watched.machine.cont()
    await watched.long_enough_for_the_button()
    assert (watched.state, watched.take()) == ("running", [("POWERDOWN", {}), ("RESUME", {})])


async def test_a_machine_stopped_just_after_its_button_was_pressed_is_switched_off_later() -> None:
    watched = Watched(no_shutdown=True)
    watched.machine.power_down()
    watched.machine.stop()
    await watched.long_enough_for_the_button()
    assert watched.take() == [("POWERDOWN", {}), ("STOP", {})]
    watched.machine.cont()
    assert await watched.until_told("SHUTDOWN") == [("RESUME", {}), OFF, ("STOP", {})]


@pytest.mark.parametrize("forgetting", ["reset", "close"])
async def test_a_machine_that_starts_over_or_ends_forgets_its_button(forgetting: str) -> None:
    watched = Watched()
    watched.machine.power_down()
    getattr(watched.machine, forgetting)()
    watched.take()
    await watched.long_enough_for_the_button()
    assert (watched.state, watched.take()) == ("running", [])


async def test_quit_is_not_followed_by_the_end_that_the_button_wanted() -> None:
    watched = Watched()
    watched.machine.power_down()
    watched.machine.tell_shutdown("host-qmp-quit")
    await watched.long_enough_for_the_button()
    assert watched.take()[1:] == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})]


async def test_a_machine_of_no_type_has_no_power_button() -> None:
    watched = Watched(type="none")
    watched.machine.power_down()
    await watched.long_enough_for_the_button()
    assert (watched.state, watched.take()) == ("running", [("POWERDOWN", {})])


async def test_a_reset_that_means_the_end_is_one() -> None:
    by_reset = ("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"})
    ending = Watched(no_reboot=True)
    ending.machine.reset()
    assert ending.take() == [by_reset, ENDED]
    staying = Watched(no_reboot=True, no_shutdown=True, started=False)
    staying.machine.reset()
    assert (staying.state, staying.take()) == ("prelaunch", [by_reset])
    staying.machine.cont()
    staying.machine.reset()
    assert (staying.state, staying.take()) == ("shutdown", [("RESUME", {}), by_reset, ("STOP", {})])


async def test_actions_can_be_changed_one_by_one() -> None:
    watched = Watched()
    watched.machine.set_actions({"shutdown": "pause"})
    watched.machine.set_actions({"reboot": "shutdown", "panic": "none"})
    watched.machine.reset()
    assert watched.state == "shutdown"
    watched.machine.set_actions({"reboot": "reset"})
    watched.machine.reset()
    assert watched.state == "prelaunch"


async def test_a_type_that_is_not_there_is_refused() -> None:
    with pytest.raises(Error, match=r'^unsupported machine type: "pc-q35-1\.0"$'):
        Watched(type="pc-q35-1.0")


async def test_a_machine_without_a_uuid_has_zeros() -> None:
    assert Watched().machine.uuid == UUID(int=0)
    text = "12345678-9abc-def0-1234-56789abcdef0"
    assert str(Watched(uuid=text).machine.uuid) == text


async def test_migration_capabilities_are_remembered() -> None:
    watched = Watched()
    watched.machine.set_migration_capabilities([{"capability": "events", "state": True}])
    assert watched.machine.migration_capabilities() == [{"capability": "events", "state": True}]
