from __future__ import annotations

from typing import Any

import pytest

from qmpd.errors import DeviceNotFound, Error
from qmpd.qom.object import Chardev
from qmpd.qom.tree import ObjectTree
from qmpd.qom.types import TYPES


async def add(tree: ObjectTree, type_: str, name: str, **options: Any) -> None:
    await tree.add({"qom-type": type_, "id": name, **options})


def names(tree: ObjectTree, path: str) -> dict[str, str]:
    return {each["name"]: each["type"] for each in tree.properties(path)}


def test_the_root_is_a_storage_daemon_s(tree: ObjectTree) -> None:
    child = "child<container>"
    assert names(tree, "/") == {"type": "string", "backend": child, "chardevs": child, "objects": child}


async def test_paths_may_be_partial_and_have_too_many_slashes(tree: ObjectTree) -> None:
    await add(tree, "secret", "s", data="x")
    for path in ("/objects/s", "objects/s", "s", "//objects//s/"):
        assert tree.get(path, "type") == "secret"


async def test_an_ambiguous_path_means_nothing(tree: ObjectTree) -> None:
    tree.show_chardev("mon", Chardev("socket"))
    assert tree.get("mon", "type") == "chardev-socket"
    await add(tree, "secret", "mon", data="x")
    with pytest.raises(Error, match="^Path 'mon' is ambiguous$") as error:
        tree.properties("mon")
    assert error.value.error_class == "GenericError"
    with pytest.raises(DeviceNotFound, match="^Device 'mon' not found$"):
        tree.get("mon", "type")
    with pytest.raises(DeviceNotFound):
        tree.set("mon", "type", "x")


def test_the_empty_path_means_everything_and_so_nothing(tree: ObjectTree) -> None:
    with pytest.raises(Error, match="^Path '' is ambiguous$"):
        tree.properties("")


@pytest.mark.parametrize("path", ["/nowhere", "nowhere", "/objects/s/data"])
async def test_a_path_to_nothing_is_not_found(tree: ObjectTree, path: str) -> None:
    await add(tree, "secret", "s", data="x")
    with pytest.raises(DeviceNotFound) as error:
        tree.properties(path)
    assert error.value.desc == f"Device '{path}' not found"


@pytest.mark.parametrize("name", ["", "1sec", "a b", "a/b", "é"])
async def test_ids_are_identifiers(tree: ObjectTree, name: str) -> None:
    with pytest.raises(Error, match="^Parameter 'id' expects an identifier$"):
        await add(tree, "secret", name, data="x")


@pytest.mark.parametrize("name", ["s", "type"])
async def test_an_id_is_used_once(tree: ObjectTree, name: str) -> None:
    await add(tree, "secret", "s", data="x")
    with pytest.raises(Error) as error:
        await add(tree, "iothread", name)
    text = f"attempt to add duplicate property '{name}' to object (type 'container')"
    assert error.value.desc == text
    assert tree.get("s", "type") == "secret"


@pytest.mark.parametrize("name", ["nope", "", "type", "objects", "mon", "/objects/s"])
def test_only_what_was_added_is_deleted(tree: ObjectTree, name: str) -> None:
    tree.show_chardev("mon", Chardev("socket"))
    with pytest.raises(Error) as error:
        tree.delete(name)
    assert error.value.desc == f"object '{name}' not found"


async def test_a_child_is_a_property_that_nobody_sets(tree: ObjectTree) -> None:
    await add(tree, "secret", "s", data="x")
    assert names(tree, "/objects") == {"type": "string", "s": "child<secret>"}
    assert tree.get("/objects", "s") == "/objects/s"
    with pytest.raises(Error, match=r"^Property 'container\.s' is not writable$"):
        tree.set("/objects", "s", "x")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("data", 2, "Invalid parameter type for 'data', expected: string"),
        ("data", None, "Invalid parameter type for 'data', expected: string"),
        ("format", 2, "Invalid parameter type for 'format', expected: string"),
        ("format", "hex", "Parameter 'format' does not accept value 'hex'"),
        ("type", "x", "Property 'secret.type' is not writable"),
        ("nope", "x", "Property 'secret.nope' not found"),
    ],
)
async def test_qom_set_refuses_in_qemu_s_words(tree: ObjectTree, name: str, value: Any, text: str) -> None:
    await add(tree, "secret", "s", data="x")
    with pytest.raises(Error) as error:
        tree.set("s", name, value)
    assert error.value.desc == text


async def test_qom_set_changes_what_qom_get_shows(tree: ObjectTree) -> None:
    await add(tree, "secret", "s", data="x")
    for name, value in {"file": "f", "format": "base64", "iv": "i", "keyid": "k"}.items():
        tree.set("s", name, value)
        assert tree.get("s", name) == value


# -- types


def test_types_are_listed_by_what_they_implement(tree: ObjectTree) -> None:
    assert tree.list_types("secret_common") == [
        {"name": "secret", "parent": "secret_common"},
        {"name": "secret_keyring", "parent": "secret_common"},
    ]
    assert {each["name"] for each in tree.list_types("user-creatable")} == {
        "authz-list",
        "authz-simple",
        "iothread",
        "secret",
        "secret_keyring",
        "throttle-group",
        "tls-creds-anon",
        "tls-creds-psk",
        "tls-creds-x509",
    }
    assert tree.list_types("nope") == []


def test_abstract_types_are_listed_on_demand(tree: ObjectTree) -> None:
    assert tree.list_types("secret_common", abstract=True) == [
        {"name": "secret_common", "abstract": True, "parent": "object"},
        {"name": "secret", "parent": "secret_common"},
        {"name": "secret_keyring", "parent": "secret_common"},
    ]
    assert not any(each.get("abstract") for each in tree.list_types())


def test_every_type_that_can_be_listed_has_properties_or_is_an_interface(tree: ObjectTree) -> None:
    for each in tree.list_types(abstract=True):
        if TYPES[each["name"]].implements("object"):
            assert tree.list_properties(each["name"])[0] == {"name": "type", "type": "string"}
        else:
            with pytest.raises(Error, match="^Parameter 'typename' expects a QOM type$"):
                tree.list_properties(each["name"])


def test_properties_of_a_type_are_those_of_its_objects(tree: ObjectTree) -> None:
    assert {each["name"]: each["type"] for each in tree.list_properties("secret")} == {
        "type": "string",
        "iv": "string",
        "keyid": "string",
        "format": "QCryptoSecretFormat",
        "file": "string",
        "data": "string",
    }
    with pytest.raises(DeviceNotFound, match="^Class 'nope' not found$"):
        tree.list_properties("nope")


def test_properties_of_a_device_type_have_their_defaults(tree: ObjectTree) -> None:
    found = {each["name"]: each for each in tree.list_properties("virtio-blk-pci")}
    assert found["num-queues"] == {"name": "num-queues", "type": "uint16", "default-value": 65535}
    assert found["serial"] == {"name": "serial", "type": "str"}
    assert found["iothread"]["type"] == "link<iothread>"
    assert "scsi" not in found


# -- iothread


async def test_an_iothread_has_qemu_s_defaults(tree: ObjectTree) -> None:
    await add(tree, "iothread", "io", **{"poll-max-ns": 5})
    values = {name: tree.get("io", name) for name in names(tree, "io")}
    assert values == {
        "type": "iothread",
        "poll-max-ns": 5,
        "poll-grow": 0,
        "poll-shrink": 0,
        "aio-max-batch": 0,
        "thread-pool-min": 0,
        "thread-pool-max": 64,
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"poll-max-ns": -1}, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ({"thread-pool-max": 0}, "bad thread-pool-min/thread-pool-max values"),
        ({"thread-pool-min": 100}, "bad thread-pool-min/thread-pool-max values"),
        ({"thread-pool-max": 1 << 32}, "bad thread-pool-min/thread-pool-max values"),
    ],
)
async def test_an_iothread_refuses_the_same_when_made_and_later(
    tree: ObjectTree, options: dict[str, int], text: str
) -> None:
    with pytest.raises(Error) as error:
        await add(tree, "iothread", "io", **options)
    assert error.value.desc == text
    await add(tree, "iothread", "io")
    for name, value in options.items():
        with pytest.raises(Error) as error:
            tree.set("io", name, value)
        assert error.value.desc == text


# -- throttle-group


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"iops-total": -1}, "bps/iops/max values must be within [0, 1000000000000000]"),
        (
            {"iops-total": 1, "iops-read": 1},
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        ({"iops-total-max": 10}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-read": 9, "bps-read-max": 8}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"iops-total": 1, "iops-total-max-length": 2}, "burst length set without burst rate"),
        ({"iops-total-max-length": 0}, "the burst length cannot be 0"),
        (
            {"iops-total": 10**15, "iops-total-max": 10**15, "iops-total-max-length": 2},
            "burst length too high for this burst rate",
        ),
        (
            {"iops-total-max-length": 1 << 32},
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        ({"iops-size": 1}, "iops size requires an iops value to be set"),
    ],
)
async def test_contradictory_limits_are_refused_in_qemu_s_words(
    tree: ObjectTree, limits: dict[str, int], text: str
) -> None:
    with pytest.raises(Error) as error:
        await add(tree, "throttle-group", "tg", limits=limits)
    assert error.value.desc == text
    assert "tg" not in tree.objects.children


async def test_limits_change_one_by_one(tree: ObjectTree) -> None:
    await add(tree, "throttle-group", "tg", limits={"iops-total": 100})
    tree.set("tg", "limits", {"bps-total": 5})
    limits = tree.get("tg", "limits")
    assert (limits["iops-total"], limits["bps-total"], limits["iops-total-max-length"]) == (100, 5, 1)
    with pytest.raises(Error, match="^Invalid parameter type for 'limits.bps-total', expected: integer$"):
        tree.set("tg", "limits", {"bps-total": "a"})
    assert tree.get("tg", "limits") == limits


async def test_a_limit_s_own_property_is_for_making_the_group_only(tree: ObjectTree) -> None:
    await add(tree, "throttle-group", "tg", **{"x-iops-total": 7})
    assert tree.get("tg", "limits")["iops-total"] == tree.get("tg", "x-iops-total") == 7
    with pytest.raises(Error, match="^Property cannot be set after initialization$"):
        tree.set("tg", "x-iops-total", 8)
    with pytest.raises(Error, match="^Property cannot be set after initialization$"):
        tree.set("tg", "x-iops-total", "8")
    with pytest.raises(Error, match="^Property values cannot be negative$"):
        await add(tree, "throttle-group", "tg2", **{"x-iops-total": -7})


# -- character devices


def test_a_character_device_tells_of_its_connection(tree: ObjectTree) -> None:
    address = {"type": "unix", "path": "/run/x"}
    tree.show_chardev("mon", Chardev("socket", lambda: True, lambda: address))
    assert names(tree, "/chardevs/mon") == {
        "type": "string",
        "connected": "bool",
        "addr": "SocketAddress",
    }
    assert tree.get("/chardevs/mon", "connected") is True
    assert tree.get("/chardevs/mon", "addr") == address
    with pytest.raises(Error, match=r"^Property 'chardev-socket\.connected' is not writable$"):
        tree.set("/chardevs/mon", "connected", False)
    tree.hide_chardev("mon")
    assert names(tree, "/chardevs") == {"type": "string"}
