from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from daemons import RunningDaemon

from qmpd.errors import Error
from qmpd.qapi import Schema, load, loads, schema_directory


def by_name(schema: Schema) -> dict[str, dict[str, Any]]:
    return {info["name"]: info for info in schema.introspection()}


def test_commands_and_events_come_first_in_the_order_of_the_schema(schema: Schema) -> None:
    names = [info["name"] for info in schema.introspection()]
    assert names[:3] == ["blockdev-add", "create", "nothing"]
    assert names.index("RESET") < names.index("0")


def test_defined_types_have_numbers_and_built_in_ones_names(schema: Schema) -> None:
    infos = by_name(schema)
    arguments = infos[infos["count"]["arg-type"]]
    types = {member["name"]: member["type"] for member in arguments["members"]}
    assert types["u8"] == types["size"] == types["i64"] == "int"
    assert types["number"] == "number"
    assert types["any"] == "any"
    assert types["u16s"] == "[int]"
    assert types["either"].isdigit()
    assert infos["[int]"] == {"name": "[int]", "meta-type": "array", "element-type": "int"}
    assert infos["any"]["json-type"] == "value"


def test_a_union_lists_its_branches_and_then_the_values_that_add_nothing(schema: Schema) -> None:
    infos = by_name(schema)
    options = infos[infos["blockdev-add"]["arg-type"]]
    assert options["tag"] == "driver"
    cases = [variant["case"] for variant in options["variants"]]
    assert cases == ["file", "old", "raw", "null-co", "quorum", "qcow2", "plain"]
    assert options["variants"][-1]["type"] == infos["nothing"]["arg-type"]


def test_optional_members_features_and_flags_are_told(schema: Schema) -> None:
    infos = by_name(schema)
    assert infos["nothing"]["allow-oob"] is True
    assert "allow-oob" not in infos["maybe"]
    assert infos["device_add"]["features"] == ["json-cli"]
    options = infos[infos["blockdev-add"]["arg-type"]]
    driver, node_name = options["members"][:2]
    assert "default" not in driver
    assert node_name["default"] is None
    assert {"name": "old", "features": ["deprecated"]} in infos[driver["type"]]["members"]
    assert "old" in infos[driver["type"]]["values"]


def test_types_that_no_command_or_event_reaches_are_not_told() -> None:
    infos = loads("{ 'struct': 'Lonely', 'data': { 'x': 'str' } } { 'command': 'c' }").introspection()
    assert [info["name"] for info in infos] == ["c", "0"]


def test_the_shipped_schema_describes_its_own_introspection() -> None:
    shipped = load(schema_directory())
    shipped.validate("[SchemaInfo]", shipped.introspection())


def rebuilt(dump: list[dict[str, Any]]) -> str:
    """Write a schema whose introspection should be the one given."""
    empty = next(info["ret-type"] for info in dump if info["name"] == "qmp_capabilities")

    def name(hidden: str) -> str:
        return f"T{hidden}" if hidden.isdigit() else hidden

    def use(hidden: str) -> Any:
        return [name(hidden[1:-1])] if hidden.startswith("[") else name(hidden)

    def members(infos: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            ("*" if "default" in info else "") + info["name"]: {"type": use(info["type"])} | features(info)
            for info in infos
        }

    def features(info: dict[str, Any]) -> dict[str, Any]:
        return {"features": info["features"]} if "features" in info else {}

    definitions: list[dict[str, Any]] = []
    for info in dump:
        definition: dict[str, Any]
        match info["meta-type"]:
            case "command" | "event" as kind:
                definition = {kind: info["name"]}
                if info["arg-type"] != empty:
                    definition |= {"data": name(info["arg-type"]), "boxed": True}
                if info.get("ret-type", empty) != empty:
                    definition["returns"] = use(info["ret-type"])
                if info.get("allow-oob"):
                    definition["allow-oob"] = True
            case "enum":
                values = [{"name": each["name"]} | features(each) for each in info["members"]]
                definition = {"enum": name(info["name"]), "data": values}
            case "alternate":
                choices = {f"m{index}": use(each["type"]) for index, each in enumerate(info["members"])}
                definition = {"alternate": name(info["name"]), "data": choices}
            case "object" if "tag" in info:
                branches = {
                    each["case"]: name(each["type"]) for each in info["variants"] if each["type"] != empty
                }
                definition = {"union": name(info["name"]), "base": members(info["members"])}
                definition |= {"discriminator": info["tag"], "data": branches}
            case "object" if info["name"] != empty:
                definition = {"struct": name(info["name"]), "data": members(info["members"])}
            case _:
                continue
        definitions.append(definition | features(info))
    return "\n".join(map(repr, definitions)).replace("True", "true")


def renumbered(dump: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number the types as they are met: QEMU leaves gaps for what it was built without."""
    numbers: dict[str, str] = {}

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            # Independent of the order in which the members of an entry were written.
            return {each: walk(value[each], each) for each in sorted(value)}
        if isinstance(value, list):
            return [walk(each, key) for each in value]
        if key in ("name", "type", "arg-type", "ret-type", "element-type") and value.strip("[]").isdigit():
            plain = value.strip("[]")
            return value.replace(plain, numbers.setdefault(plain, str(len(numbers))))
        return value

    return [walk(info, "") for info in dump]


@pytest.fixture
def qemu_introspection(start_storage_daemon: Callable[..., RunningDaemon]) -> list[dict[str, Any]]:
    infos: list[dict[str, Any]] = start_storage_daemon().execute("query-qmp-schema")
    return infos


@pytest.mark.peer("qemu-storage-daemon")
def test_a_schema_rebuilt_from_qemus_introspection_has_qemus_introspection(
    qemu_introspection: list[dict[str, Any]],
) -> None:
    ours = loads(rebuilt(qemu_introspection)).introspection()
    assert renumbered(ours) == renumbered(qemu_introspection)


@pytest.mark.peer("qemu-storage-daemon")
def test_qemus_own_schema_validates_as_qemu_does(qemu_introspection: list[dict[str, Any]]) -> None:
    # Forty drivers: the error is still about the one that was asked for.
    schema = loads(rebuilt(qemu_introspection))
    with pytest.raises(Error, match=r"Parameter 'file\.server\.type' is missing"):
        schema.commands["blockdev-add"].validate(
            {"driver": "raw", "file": {"driver": "nbd", "server": {"path": "x"}}}
        )
