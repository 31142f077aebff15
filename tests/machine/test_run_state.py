from __future__ import annotations

import itertools

import pytest

from qmpd.errors import Error
from qmpd.machine.run_state import STEPS, State, Step, Verb, step
from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory
from qmpd.qapi.types import EnumType

EVERYTHING = list(itertools.product(State, Verb))


def test_states_are_values_of_the_wire_type() -> None:
    run_state = load(schema_directory(), SYSTEM_SCHEMA).types["RunState"]
    assert isinstance(run_state, EnumType)
    assert set(State) <= {value.name for value in run_state.values}


@pytest.mark.parametrize(("state", "verb"), EVERYTHING)
def test_what_the_table_does_not_have_changes_nothing_and_tells_nobody(state: State, verb: Verb) -> None:
    if (state, verb) in STEPS or (state, verb) == (State.SHUTDOWN, Verb.CONT):
        return
    assert step(state, verb) == Step(state, None)


def test_a_machine_that_was_switched_off_wants_a_reset_before_it_goes_on() -> None:
    with pytest.raises(Error, match=r"^Resetting the Virtual Machine is required$"):
        step(State.SHUTDOWN, Verb.CONT)
    assert step(State.SHUTDOWN, Verb.RESET) == Step(State.PRELAUNCH)


def test_clients_are_told_of_every_step_into_and_out_of_running() -> None:
    for (state, _), found in STEPS.items():
        crosses = (state is State.RUNNING) != (found.state is State.RUNNING)
        assert (found.event is not None) == crosses
        if found.event is not None:
            assert found.event == ("RESUME" if found.state is State.RUNNING else "STOP")


def test_every_state_can_be_reached_and_left() -> None:
    assert {found.state for found in STEPS.values()} == set(State)
    assert {state for state, _ in STEPS} == set(State)
