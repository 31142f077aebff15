"""The object tree: objects by path, and the commands on them.

The root holds the containers ``backend``, ``chardevs`` and ``objects``, and
``machine``: an emulator's from the start, a storage daemon's from the moment on
when there is a device (without one it looks like QEMU's, which has no machine).

A path is absolute, or it is *partial*: then it means the one object whose path
ends with it, and if there are several, none.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from qmpd.block.throttle_groups import ThrottleGroups
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import DeviceNotFound, Error
from qmpd.qapi import Schema
from qmpd.qapi.settings import is_identifier
from qmpd.qom.authz import Authorization, AuthorizationList, SimpleAuthorization
from qmpd.qom.iothread import IOThread
from qmpd.qom.machine import MachineObject
from qmpd.qom.memory_backend import FileBackend, MemfdBackend, MemoryBackend, RamBackend
from qmpd.qom.models import DEFAULTS, OF_ALL_DEVICES, device_property_types
from qmpd.qom.object import OBJECT_TYPE_NAMES, Chardev, Container, Object, schema_properties
from qmpd.qom.secret import AnySecret, Secret, check_utf8
from qmpd.qom.secret_keyring import KeyringSecret
from qmpd.qom.throttle_group import ThrottleGroup
from qmpd.qom.tls_creds import Anonymous, PreSharedKeys, TLSCredentials, X509Credentials
from qmpd.qom.types import TYPES, machine_type
from qmpd.qom.user_creatable import UserCreatable

#: What a device's property can be, for types with few values.
_CHOICES: Final[Mapping[str, str]] = {
    "bool": "on/off",
    "OnOffAuto": "on/off/auto",
    "BlockdevOnError": "report/ignore/enospc/stop/auto",
}

#: What `object-add` makes.
_CREATABLE: Final[Mapping[str, type[UserCreatable]]] = {
    class_.qom_type: class_
    for class_ in (
        Anonymous,
        AuthorizationList,
        FileBackend,
        IOThread,
        KeyringSecret,
        MemfdBackend,
        PreSharedKeys,
        RamBackend,
        Secret,
        SimpleAuthorization,
        ThrottleGroup,
        X509Credentials,
    )
}


class AmbiguousPath(Error):
    """A partial path that is the end of several objects' paths."""


class ObjectTree:
    """All objects of a daemon.

    :param schema: has the structs that objects' properties are in.
    :param key_memory: where secrets' values are; by default in pages of their own.
    :param machine: the machine, if there is one.
    :param machine_types: the full names of the types of machines that there could be.
    """

    def __init__(
        self,
        schema: Schema,
        key_memory: KeyMemory | None = None,
        machine: MachineObject | None = None,
        machine_types: Iterable[str] = (),
    ) -> None:
        self.schema = schema
        self.key_memory = key_memory or KeyMemory()
        #: Those that objects were made for, and those that are there for disks alone.
        self.throttle_groups = ThrottleGroups()
        self._types = {info.name: info for info in TYPES.values() if machine is not None or not info.emulator}
        self._types.update((info.name, info) for info in map(machine_type, machine_types))
        self.root = Container()
        self.backend = self.root.container("backend")
        if machine is not None:
            self.root.add("machine", machine)
            self.machine()
        self.objects = self.root.container("objects")
        self._chardevs = self.root.container("chardevs")

    # -- looking

    def absolute(self, path: str) -> Object | None:
        """The object at an absolute path, or None."""
        return _below(self.root, [part for part in path.split("/") if part])

    def resolve(self, path: str) -> Object:
        """The object at a path, which may be partial.

        :raise AmbiguousPath: if it is, and means several.
        :raise DeviceNotFound: if it means none.
        """
        if path.startswith("/"):
            found = self.absolute(path)
        else:
            matches = list(_matches(self.root, [part for part in path.split("/") if part]))
            if len(matches) > 1:
                raise AmbiguousPath(f"Path '{path}' is ambiguous")
            found = matches[0] if matches else None
        if found is None:
            raise DeviceNotFound(f"Device '{path}' not found")
        return found

    def _object(self, path: str) -> Object:
        try:
            return self.resolve(path)
        except AmbiguousPath:
            # qom-get and qom-set tell no difference, unlike qom-list.
            raise DeviceNotFound(f"Device '{path}' not found") from None

    # -- the commands

    async def add(self, options: Mapping[str, Any]) -> None:
        """Make an object, as `object-add` does.

        :param options: ObjectOptions, validated.
        :raise Error: if it can't be made; then nothing has changed.
        """
        object_id: str = options["id"]
        if not is_identifier(object_id):
            raise Error("Parameter 'id' expects an identifier")
        made = _CREATABLE[options["qom-type"]](options)
        made.bind(self.schema)
        self.objects.add(object_id, made)
        try:
            await made.complete(options, self)
        except BaseException:
            if self.objects.children.get(object_id) is made:
                self.objects.remove(made)
            made.removed()
            raise
        if self.objects.children.get(object_id) is not made:
            # Deleted by another client while it was being loaded.
            made.removed()

    def delete(self, object_id: str) -> None:
        """Remove an object that `add` made, as `object-del` does.

        :raise Error: if it is not there or in use.
        """
        found = self.objects.children.get(object_id)
        if not isinstance(found, UserCreatable):
            raise Error(f"object '{object_id}' not found")
        if found.in_use:
            raise Error(f"object '{object_id}' is in use, can not be deleted")
        self.objects.remove(found)
        found.removed()

    def properties(self, path: str) -> list[dict[str, Any]]:
        """The properties of an object (ObjectPropertyInfo), as `qom-list` does.

        :raise Error: if there is no such object.
        """
        names = self.resolve(path).property_names()
        return [{"name": name, "type": type_} for name, type_ in names.items()]

    def get(self, path: str, name: str) -> Any:
        """The value of a property, as `qom-get` does.

        :raise Error: if there is no such object or property.
        """
        return self._object(path).property(name).get()

    def set(self, path: str, name: str, value: Any) -> Awaitable[None] | None:
        """Give a property a new value, as `qom-set` does.

        :returns: what has to be awaited before it is done, if anything.
        :raise Error: if there is no such object or property, or it does not take the value.
        """
        found = self._object(path)
        setter = found.property(name).set
        if setter is None:
            raise Error(f"Property '{found.type_name}.{name}' is not writable")
        return setter(value)

    def list_types(self, wanted: str | None = None, *, abstract: bool = False) -> list[dict[str, Any]]:
        """Types of objects (ObjectTypeInfo), as `qom-list-types` does.

        :param wanted: only those that are, extend or implement this one.
        :param abstract: abstract ones too.
        """
        return [
            {"name": info.name}
            | ({"abstract": True} if info.abstract else {})
            | ({"parent": info.parent} if info.parent else {})
            for info in self._types.values()
            if (abstract or not info.abstract) and (wanted is None or info.implements(wanted))
        ]

    def list_properties(self, type_name: str) -> list[dict[str, Any]]:
        """The properties of objects of a type (ObjectPropertyInfo), as `qom-list-properties` does.

        :raise Error: if it is no type of objects.
        """
        info = self._types.get(type_name)
        if info is None:
            raise DeviceNotFound(f"Class '{type_name}' not found")
        if not info.implements("object"):
            raise Error("Parameter 'typename' expects a QOM type")
        properties = {"type": "string"}
        if info.implements("device"):
            properties.update(device_property_types(self.schema, type_name))
            return [self._property_info(name, type_) for name, type_ in properties.items()]
        if info.struct is not None:
            properties.update(schema_properties(self.schema, info.struct, OBJECT_TYPE_NAMES))
        properties.update(info.all_properties())
        return [{"name": name, "type": type_} for name, type_ in properties.items()]

    def list_device_properties(self, type_name: str) -> list[dict[str, Any]]:
        """The properties that a device's type has and not every device's, as `device-list-properties` does.

        :raise Error: if it is no type of devices.
        """
        info = self._types.get(type_name)
        if info is None:
            raise DeviceNotFound(f"Device '{type_name}' not found")
        if info.abstract or not info.implements("device"):
            raise Error("Parameter 'typename' expects a non-abstract device type")
        return [
            self._property_info(name, type_)
            for name, type_ in device_property_types(self.schema, type_name).items()
            if name not in OF_ALL_DEVICES and not name.startswith("legacy-")
        ]

    def _property_info(self, name: str, type_: str) -> dict[str, Any]:
        """What is said of a device type's property (ObjectPropertyInfo)."""
        return {
            "name": name,
            "type": type_,
            **({"default-value": DEFAULTS[name]} if name in DEFAULTS else {}),
            **({"description": _CHOICES[type_]} if type_ in _CHOICES else {}),
        }

    # -- what others of the daemon need

    def raw_secret(self, secret_id: str) -> KeyBuffer:
        """A copy of a secret's bytes, for the caller to wipe.

        :raise Error: if there is no secret with this id.
        """
        found = self.objects.children.get(secret_id)
        if found is None:
            raise Error(f"No secret with id '{secret_id}'")
        if not isinstance(found, AnySecret):
            raise Error(f"Object with id '{secret_id}' is not a secret")
        return found.value()

    def secret_bytes(self, secret_id: str) -> KeyBuffer:
        """A copy of the passphrase with this id, for the caller to wipe.

        :raise Error: if there is none, or if it is no text in UTF-8.
        """
        value = self.raw_secret(secret_id)
        check_utf8(secret_id, value)
        return value

    def check_iothread(self, iothread_id: str) -> None:
        """See that there is an I/O thread.

        :raise Error: if there is none with this id.
        """
        if not isinstance(self.objects.children.get(iothread_id), IOThread):
            raise Error(f'iothread "{iothread_id}" not found')

    def use_memory(self, backend_id: str) -> int:
        """Make an object the machine's memory, on paper.

        :return: its size in bytes.
        :raise Error: if it is not there or no memory.
        """
        found = self.objects.children.get(backend_id)
        if not isinstance(found, MemoryBackend):
            raise Error(f"Memory backend '{backend_id}' not found")
        found.is_memory = True
        machine = self.machine()
        if isinstance(machine, MachineObject):
            machine.memory = found
        return int(found.get("size"))

    def iothreads(self) -> list[dict[str, Any]]:
        """The I/O threads (IOThreadInfo)."""
        return self._infos(IOThread)

    def memory_backends(self) -> list[dict[str, Any]]:
        """The objects that would hold memory (Memdev)."""
        return self._infos(MemoryBackend)

    def _infos(self, wanted: type[IOThread | MemoryBackend]) -> list[dict[str, Any]]:
        return [
            {"id": name, **each.info()}
            for name, each in self.objects.children.items()
            if isinstance(each, wanted)
        ]

    def tls_server_context(self, credentials_id: str, authorization_id: str | None = None) -> ssl.SSLContext:
        """What a server needs for the TLS credentials with this id.

        :param authorization_id: the object that decides about each client when it comes; nobody gets in
            while there is none with this id.  None to let everybody in.
        :raise Error: if there are no such credentials, or they are a client's.
        """
        found = self.objects.children.get(credentials_id)
        if found is None:
            raise Error(f"No TLS credentials with id '{credentials_id}'")
        if not isinstance(found, TLSCredentials):
            raise Error(f"Object with id '{credentials_id}' is not TLS credentials")
        if authorization_id is None:
            return found.server_context()
        return found.server_context(partial(self._authorizes, authorization_id))

    def _authorizes(self, authorization_id: str, identity: str) -> bool:
        found = self.objects.children.get(authorization_id)
        return isinstance(found, Authorization) and found.allows(identity)

    def show_chardev(self, chardev_id: str, chardev: Chardev) -> None:
        """Put a character device below ``/chardevs``.

        :raise Error: if the id is taken.
        """
        self._chardevs.add(chardev_id, chardev)

    def hide_chardev(self, chardev_id: str) -> None:
        """Take a character device out again."""
        self._chardevs.remove(self._chardevs.children[chardev_id])

    def machine(self) -> Container:
        """The container ``/machine`` with those below it, made if it is not there yet.

        What a board has of itself is in ``unattached``; without a board that is empty.
        """
        machine = self.root.container("machine")
        for name in ("unattached", "peripheral-anon", "peripheral"):
            machine.container(name)
        return machine

    def close(self) -> None:
        """Remove all objects, wipe all secrets."""
        for each in list(self.objects.children.values()):
            self.objects.remove(each)
            if isinstance(each, UserCreatable):
                each.removed()


def _below(start: Object, parts: list[str]) -> Object | None:
    found: Object | None = start
    for part in parts:
        if found is None:
            return None
        found = found.children.get(part)
    return found


def _matches(start: Object, parts: list[str]) -> list[Object]:
    """The objects below `start`, and itself, whose path ends with `parts`; two of them are enough."""
    result: list[Object] = []
    waiting = [start]
    while waiting and len(result) < 2:
        each = waiting.pop()
        found = _below(each, parts)
        if found is not None:
            result.append(found)
        waiting.extend(each.children.values())
    return result
