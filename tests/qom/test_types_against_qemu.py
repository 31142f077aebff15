"""What is said of a type's place and properties is what QEMU's emulator says."""

from __future__ import annotations

from typing import Any, Final

import pytest
from daemons import emulator_replies

from qmpd.machine import types as machines
from qmpd.qapi import load, schema_directory
from qmpd.qom.machine import MachineObject
from qmpd.qom.models import MODELS, SOLDERED
from qmpd.qom.tree import ObjectTree

pytestmark = pytest.mark.peer("qemu-system-x86_64")

DEVICES: Final = (*MODELS, *SOLDERED, "virtio-blk-device", "virtio-scsi-device")
MACHINES: Final = ("none-machine", "generic-pc-machine", "pc-q35-10.0-machine", "pc-i440fx-10.0-machine")

Described = dict[str, dict[str, Any]]


def by_name(described: list[dict[str, Any]]) -> Described:
    return {each["name"]: each for each in described}


@pytest.fixture(scope="module")
def tree() -> ObjectTree:
    """An emulator's."""
    schema = load(schema_directory(), "system-schema.json")
    return ObjectTree(schema, machine=MachineObject("pc-q35-10.0", {}), machine_types=machines.TYPES)


def without_text(described: dict[str, Any]) -> dict[str, Any]:
    """QEMU's descriptions are sentences: nobody has to say the same."""
    return {name: value for name, value in described.items() if name != "description"}


def test_every_type_extends_what_it_extends_in_qemu(tree: ObjectTree) -> None:
    (theirs,) = emulator_replies({"execute": "qom-list-types", "arguments": {"abstract": True}})
    theirs = by_name(theirs)
    ours = by_name(tree.list_types(abstract=True))
    assert len(ours) > 80
    assert {name: theirs.get(name) for name in ours} == ours


@pytest.mark.parametrize("command", ["device-list-properties", "qom-list-properties"])
def test_what_a_model_has_it_has_in_qemu(tree: ObjectTree, command: str) -> None:
    """Each property is there, of the same type and with the same default."""
    replies = emulator_replies(*({"execute": command, "arguments": {"typename": name}} for name in DEVICES))
    listed = tree.list_device_properties if command.startswith("device") else tree.list_properties
    for name, reply in zip(DEVICES, replies, strict=True):
        theirs = {each: without_text(info) for each, info in by_name(reply).items()}
        ours = {each: without_text(info) for each, info in by_name(listed(name)).items()}
        assert {each: theirs.get(each) for each in ours} == ours, name


def test_what_a_machine_has_it_has_in_qemu(tree: ObjectTree) -> None:
    replies = emulator_replies(
        *({"execute": "qom-list-properties", "arguments": {"typename": name}} for name in MACHINES)
    )
    for name, reply in zip(MACHINES, replies, strict=True):
        theirs = {each: info["type"] for each, info in by_name(reply).items()}
        ours = {each: info["type"] for each, info in by_name(tree.list_properties(name)).items()}
        assert {each: theirs.get(each) for each in ours} == ours, name
        assert len(ours) > 1


def test_an_implementation_is_one_in_qemu(tree: ObjectTree) -> None:
    """For an interface or a base type the same types are listed, of those that are here."""
    bases = [each["name"] for each in tree.list_types(abstract=True) if each.get("abstract")]
    bases.remove("interface")  # which is for more in QEMU: it has interfaces that nobody has here
    replies = emulator_replies(
        *(
            {"execute": "qom-list-types", "arguments": {"implements": base, "abstract": True}}
            for base in bases
        )
    )
    known = by_name(tree.list_types(abstract=True)).keys()
    theirs = {base: by_name(reply).keys() & known for base, reply in zip(bases, replies, strict=True)}
    assert {base: set(by_name(tree.list_types(base, abstract=True))) for base in bases} == theirs
