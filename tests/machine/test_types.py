from __future__ import annotations

from typing import Any

import pytest
from daemons import emulator_replies

from qmpd.errors import Error
from qmpd.machine import types
from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory

#: What QEMU says of a type and is not so here.
NOT_HERE = {"default-cpu-type", "default-ram-id", "hotpluggable-cpus", "acpi"}


def test_every_type_is_found_by_its_name_and_alias() -> None:
    for machine_type in types.TYPES.values():
        assert types.find(machine_type.name) is machine_type
        if machine_type.alias is not None:
            assert types.find(machine_type.alias) is machine_type


def test_one_type_is_the_default() -> None:
    assert [each.name for each in types.TYPES.values() if each.default] == [types.DEFAULT.name]


def test_a_type_that_is_not_there_is_refused_with_a_hint() -> None:
    with pytest.raises(Error, match=r'^unsupported machine type: "isapc"$') as caught:
        types.find("isapc")
    assert "-machine help" in caught.value.hint


def test_answers_are_what_the_schema_says() -> None:
    schema = load(schema_directory(), SYSTEM_SCHEMA)
    for compat_props in (False, True):
        for info in types.infos(compat_props=compat_props):
            schema.validate("MachineInfo", info)
            assert ("compat-props" in info) is compat_props


@pytest.mark.peer("qemu-system-x86_64")
def test_types_are_those_that_qemu_does_not_call_deprecated() -> None:
    (machines,) = emulator_replies({"execute": "query-machines"})
    theirs = {
        info["name"]: comparable(info)
        for info in machines
        if not info["deprecated"] and info["name"].startswith(("pc-", "none"))
    }
    assert {info["name"]: comparable(info) for info in types.infos(compat_props=False)} == theirs


def comparable(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name not in NOT_HERE}
