"""The schema says of each command and event what QEMU's own introspection says.

A client that was written for QEMU finds the same arguments here, in the same
order, under the same names, optional where they are optional there, and of the
same kind in JSON; a reply holds nothing that QEMU's could not hold.  What only
QEMU has is in :data:`ONLY_QEMU` with the reason, what only qmpd has in
:data:`ONLY_QMPD`, and an entry that is not needed any more fails the test.

A place is named by the command or event, ``->`` for its reply, ``.member``,
``[]`` for a list's elements and ``<case>`` for a branch of a union.  A type is
compared where it is met first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from daemons import RunningDaemon, emulator_replies

from qmpd.qapi import STORAGE_SCHEMA, SYSTEM_SCHEMA, load, schema_directory

Entity = Mapping[str, Any]

LATER: Final = "comes together with the driver, object or job that it belongs to"
MACHINE: Final = "is about a machine, of which there is none"
NETWORK: Final = "is about networks or a guest's other devices"
CHAINS: Final = "is about compression and bitmaps, which no driver of ours has"
PRIMITIVES: Final = "is not offered by the cryptography library, or is no mode for a disk"
ORNAMENT: Final = "would have no effect"
MIGRATION: Final = "is about migration, of which there is none"
ABSENT: Final = "is about a processor or a device of a machine, of which there is none"
OURS: Final = "is an extension, and named as one"


#: (place, members or values that only QEMU has there, why qmpd has not).
ONLY_QEMU: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "blockdev-add.driver",
        "blkdebug blklogwrites blkreplay blkverify bochs cloop compress copy-before-write copy-on-read dmg "
        "ftp ftps gluster host_cdrom http https iscsi nbd nfs nvme parallels preallocate qcow "
        "qed quorum rbd replication snapshot-access ssh vdi vhdx vmdk vpc vvfat",
        LATER,
    ),
    ("blockdev-add<file>", "aio-max-batch pr-manager x-check-cache-dropped", ORNAMENT),
    (
        "blockdev-create.options<luks>.cipher-alg",
        "3des cast5-128 des serpent-128 serpent-192 serpent-256 sm4 twofish-128 twofish-192 twofish-256",
        PRIMITIVES,
    ),
    ("blockdev-create.options<luks>.cipher-mode", "ctr ecb", PRIMITIVES),
    ("blockdev-create.options<luks>.ivgen-hash-alg", "ripemd160", PRIMITIVES),
    ("query-named-block-nodes ->[].image.format-specific<qcow2>.data", "bitmaps", CHAINS),
    (
        "object-add.qom-type",
        "acpi-generic-initiator acpi-generic-port cryptodev-backend cryptodev-backend-builtin "
        "cryptodev-backend-lkcf cryptodev-vhost-user dbus-vmstate input-barrier input-linux iommufd "
        "memory-backend-epc memory-backend-file memory-backend-memfd memory-backend-ram memory-backend-shm "
        "pef-guest qtest rng-builtin rng-egd rng-random s390-pv-guest sev-guest sev-snp-guest thread-context "
        "x-remote-object x-vfio-user-server",
        MACHINE,
    ),
    (
        "object-add.qom-type",
        "can-bus can-host-socketcan colo-compare filter-buffer filter-dump filter-mirror filter-redirector "
        "filter-replay filter-rewriter",
        NETWORK,
    ),
    (
        "object-add.qom-type",
        "authz-listfile authz-pam main-loop pr-manager-helper tls-cipher-suites",
        LATER,
    ),
    ("block-export-add.type", "fuse vduse-blk vhost-user-blk", LATER),
    (
        "query-jobs ->[].type",
        "backup commit mirror snapshot-delete snapshot-load snapshot-save stream",
        LATER,
    ),
    ("query-block-jobs ->[]", "<mirror>", LATER),
    ("query-named-block-nodes ->[]", "dirty-bitmaps", CHAINS),
    (
        "query-named-block-nodes ->[].image",
        "compressed",
        CHAINS,
    ),
    (
        "transaction.actions[].type",
        "block-dirty-bitmap-add block-dirty-bitmap-clear block-dirty-bitmap-disable "
        "block-dirty-bitmap-enable block-dirty-bitmap-merge block-dirty-bitmap-remove blockdev-backup "
        "drive-backup",
        LATER,
    ),
    ("query-named-block-nodes ->[].image.format-specific.type", "rbd vmdk", LATER),
)

#: The same for the commands that only the emulator has.
ONLY_QEMU_EMULATOR: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "migrate-set-capabilities.capabilities[].capability",
        "auto-converge background-snapshot dirty-bitmaps dirty-limit late-block-activate mapped-ram multifd "
        "pause-before-switchover postcopy-blocktime postcopy-preempt postcopy-ram rdma-pin-all release-ram "
        "return-path switchover-ack validate-uuid x-colo x-ignore-shared xbzrle zero-blocks zero-copy-send",
        MIGRATION,
    ),
    (
        "query-migrate ->",
        "cpu-throttle-percentage dirty-limit-ring-full-time dirty-limit-throttle-time-per-round downtime "
        "error-desc expected-downtime postcopy-blocktime postcopy-vcpu-blocktime ram setup-time "
        "socket-address status total-time vfio xbzrle-cache",
        MIGRATION,
    ),
    (
        "query-target ->.arch",
        "aarch64 alpha arm avr hppa i386 loongarch64 m68k microblaze microblazeel mips mips64 mips64el "
        "mipsel or1k ppc ppc64 riscv32 riscv64 rx s390x sh4 sh4eb sparc sparc64 tricore xtensa xtensaeb",
        ABSENT,
    ),
    ("query-cpus-fast ->[]", "<s390x>", ABSENT),
    ("query-cpus-fast ->[].props", "book-id cluster-id drawer-id module-id", ABSENT),
    (
        "query-display-options ->",
        "<curses> <dbus> <egl-headless> <gtk> <sdl> full-screen gl show-cursor window-close",
        ABSENT,
    ),
    ("query-display-options ->.type", "curses dbus default egl-headless gtk sdl spice-app", ABSENT),
    (
        "query-memory-devices ->[]",
        "<dimm> <hv-balloon> <nvdimm> <sgx-epc> <virtio-mem> <virtio-pmem>",
        ABSENT,
    ),
    ("query-memory-devices ->[].type", "hv-balloon nvdimm sgx-epc virtio-mem virtio-pmem", ABSENT),
    ("query-replay ->.mode", "play record", ABSENT),
    ("query-tpm ->[].options", "<emulator> <passthrough>", ABSENT),
    ("query-tpm-models ->[]", "tpm-spapr", ABSENT),
)

LUKS2: Final = "is of LUKS2, which QEMU has not"

#: (place, members or values that only qmpd has there, why).
ONLY_QMPD: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "x-blockdev-amend.options<qcow2>",
        "backing-file backing-fmt data-file data-file-raw lazy-refcounts refcount-bits size version",
        "is what qemu-img can amend, and QEMU's daemons can't",
    ),
    ("blockdev-add.driver", "gluks", "is the driver's name in early proposals, and deprecated"),
    ("blockdev-add<luks>", "header-file", "is the member's name in early proposals, and deprecated"),
    (
        "blockdev-create.options<luks>",
        "version pbkdf pbkdf-memory pbkdf-parallel sector-size label subsystem",
        LUKS2,
    ),
    ("x-blockdev-amend.options<luks>", "pbkdf pbkdf-memory pbkdf-parallel", LUKS2),
    (
        "query-named-block-nodes ->[].image.format-specific<luks>.data",
        "version label subsystem sector-size damaged",
        LUKS2,
    ),
    (
        "query-named-block-nodes ->[].image.format-specific<luks>.data.slots[]",
        "slot pbkdf pbkdf-memory pbkdf-parallel priority",
        LUKS2,
    ),
    (
        "query-jobs ->[].type",
        "__org.qmpd_luks-header-backup __org.qmpd_luks-header-restore __org.qmpd_luks-convert",
        OURS,
    ),
    ("query-block ->[]", "nbd-uri", "tells where a device is served, which QEMU never does"),
)

#: Members that QEMU insists on and qmpd does not.
OPTIONAL_HERE: Final[Mapping[str, str]] = {
    "blockdev-create.options<luks>.size": "a detached header can be made alone; else the command asks for it",
}

#: Commands and events that one of QEMU's two programs has and the other has not.
OF_THE_MACHINE: Final = frozenset(
    {
        "add-fd",
        "block-latency-histogram-set",
        "closefd",
        "device_add",
        "device_del",
        "getfd",
        "human-monitor-command",
        "query-fdsets",
        "remove-fd",
        "system_reset",
        "DEVICE_DELETED",
        "RESET",
    }
)


#: Commands that only qmpd has, and why.
COMMANDS_OF_QMPD: Final[Mapping[str, str]] = {
    "blockdev-amend": "is x-blockdev-amend, which QEMU calls unstable",
    "__org.qmpd_query-luks-keyslots": OURS,
    "__org.qmpd_luks-header-backup": OURS,
    "__org.qmpd_luks-header-restore": OURS,
    "__org.qmpd_luks-convert": OURS,
}


@dataclass
class Comparison:
    """Two introspections, and where they differ.

    ``only_ours`` and ``only_theirs`` hold (place, name), ``optional_here`` the
    places of members that only QEMU insists on, ``wrong`` what no table excuses.
    """

    ours: Mapping[str, Entity]
    theirs: Mapping[str, Entity]
    only_ours: set[tuple[str, str]] = field(default_factory=set)
    only_theirs: set[tuple[str, str]] = field(default_factory=set)
    optional_here: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    _met: set[tuple[str, str]] = field(default_factory=set)

    def command_or_event(self, name: str) -> None:
        our, their = self.ours[name], self.theirs[name]
        for key in ("meta-type", "features", "allow-oob"):
            self._same(name, key, our.get(key), their.get(key))
        self.types(name, our["arg-type"], their["arg-type"])
        if our["meta-type"] == "command":
            self.types(f"{name} ->", our["ret-type"], their["ret-type"])

    def types(self, place: str, our_name: str, their_name: str) -> None:
        if (our_name, their_name) in self._met:
            return
        self._met.add((our_name, their_name))
        our, their = self.ours[our_name], self.theirs[their_name]
        self._same(place, "meta-type", our["meta-type"], their["meta-type"])
        if our["meta-type"] != their["meta-type"]:
            return
        self._same(place, "features", our.get("features"), their.get("features"))
        match our["meta-type"]:
            case "builtin":
                self._same(place, "json-type", our["json-type"], their["json-type"])
            case "array":
                self.types(f"{place}[]", our["element-type"], their["element-type"])
            case "enum":
                self._members(place, our, their)
            case "alternate":
                self._alternates(place, our, their)
            case "object":
                self._objects(place, our, their)

    def _same(self, place: str, what: str, our: object, their: object) -> None:
        if our != their:
            self.wrong.append(f"{place}: {what} is {our!r}, QEMU's is {their!r}")

    def _members(self, place: str, our: Entity, their: Entity) -> list[tuple[Entity, Entity]]:
        """Compare the names, and return those members that both have."""
        ours = {member["name"]: member for member in our["members"]}
        theirs = {member["name"]: member for member in their["members"]}
        self.only_ours |= {(place, name) for name in ours.keys() - theirs.keys()}
        self.only_theirs |= {(place, name) for name in theirs.keys() - ours.keys()}
        for name in sorted(ours.keys() & theirs.keys()):
            features = ours[name].get("features"), theirs[name].get("features")
            self._same(f"{place}.{name}", "features", *features)
        self._same(place, "order", [n for n in ours if n in theirs], [n for n in theirs if n in ours])
        return [(ours[name], theirs[name]) for name in ours if name in theirs]

    def _alternates(self, place: str, our: Entity, their: Entity) -> None:
        ours = {self._kind(self.ours[member["type"]]): member["type"] for member in our["members"]}
        theirs = {self._kind(self.theirs[member["type"]]): member["type"] for member in their["members"]}
        self._same(place, "alternatives", sorted(ours), sorted(theirs))
        for kind in sorted(ours.keys() & theirs.keys()):
            self.types(place, ours[kind], theirs[kind])

    def _objects(self, place: str, our: Entity, their: Entity) -> None:
        for our_member, their_member in self._members(place, our, their):
            inner = f"{place}.{our_member['name']}"
            if "default" in our_member and "default" not in their_member:
                self.optional_here.add(inner)
            else:
                self._same(inner, "optional", "default" in our_member, "default" in their_member)
            self.types(inner, our_member["type"], their_member["type"])
        ours = {variant["case"]: variant["type"] for variant in our.get("variants", ())}
        theirs = {variant["case"]: variant["type"] for variant in their.get("variants", ())}
        if ours:
            self._same(place, "tag", our.get("tag"), their.get("tag"))
            for case in sorted(ours.keys() & theirs.keys()):  # the others are found as values of the tag
                self.types(f"{place}<{case}>", ours[case], theirs[case])
        else:
            filled = {case for case, name in theirs.items() if self.theirs[name]["members"]}
            self.only_theirs |= {(place, f"<{case}>") for case in filled}

    @staticmethod
    def _kind(entity: Entity) -> tuple[str, str]:
        return entity["meta-type"], entity.get("json-type", "")


def own_introspection(file: str = STORAGE_SCHEMA) -> dict[str, Entity]:
    return {entity["name"]: entity for entity in load(schema_directory(), file).introspection()}


def excused(table: tuple[tuple[str, str, str], ...]) -> set[tuple[str, str]]:
    return {(place, name) for place, names, _ in table for name in names.split()}


@pytest.fixture
def comparison(start_storage_daemon: Callable[[], RunningDaemon]) -> Comparison:
    """Our introspection beside that of qemu-storage-daemon, every common entry compared."""
    theirs = {entity["name"]: entity for entity in start_storage_daemon().execute("query-qmp-schema")}
    comparison = Comparison(own_introspection(), theirs)
    for name, entity in comparison.ours.items():
        elsewhere = name in OF_THE_MACHINE or name in COMMANDS_OF_QMPD
        if entity["meta-type"] in ("command", "event") and not elsewhere:
            assert name in theirs, f"{name} is no command or event of QEMU's"
            comparison.command_or_event(name)
    return comparison


@pytest.mark.peer("qemu-storage-daemon")
def test_what_both_have_looks_the_same(comparison: Comparison) -> None:
    assert comparison.wrong == []


@pytest.mark.peer("qemu-storage-daemon")
def test_commands_that_only_qmpd_has_are_not_in_qemu(comparison: Comparison) -> None:
    assert comparison.theirs.keys().isdisjoint(COMMANDS_OF_QMPD)


@pytest.mark.peer("qemu-storage-daemon")
def test_what_is_optional_only_here_is_listed_with_a_reason(comparison: Comparison) -> None:
    assert comparison.optional_here == OPTIONAL_HERE.keys()


@pytest.mark.peer("qemu-storage-daemon")
def test_what_only_qemu_has_is_listed_with_a_reason(comparison: Comparison) -> None:
    assert comparison.only_theirs == excused(ONLY_QEMU)


@pytest.mark.peer("qemu-storage-daemon")
def test_what_only_qmpd_has_is_listed_with_a_reason(comparison: Comparison) -> None:
    assert comparison.only_ours == excused(ONLY_QMPD)


def emulator_introspection() -> dict[str, Entity]:
    """Ask qemu-system-x86_64."""
    (entities,) = emulator_replies({"execute": "query-qmp-schema"})
    return {entity["name"]: entity for entity in entities}


@pytest.fixture(scope="module")
def emulators() -> Comparison:
    """Our emulator's introspection beside that of qemu-system-x86_64, nothing compared yet."""
    return Comparison(own_introspection(SYSTEM_SCHEMA), emulator_introspection())


@pytest.mark.peer("qemu-system-x86_64")
def test_commands_of_the_machine_look_the_same(emulators: Comparison) -> None:
    """The commands that qemu-storage-daemon lacks are compared with the emulator's."""
    comparison = Comparison(own_introspection(), emulators.theirs)
    for name in sorted(OF_THE_MACHINE):
        comparison.command_or_event(name)
    assert comparison.wrong == []
    assert comparison.only_theirs == set()
    assert comparison.only_ours == set()
    assert comparison.optional_here == set()


@pytest.mark.peer("qemu-system-x86_64")
def test_commands_of_the_emulator_look_the_same(emulators: Comparison) -> None:
    """What the storage daemon's schema has not is compared with the emulator's."""
    comparison = Comparison(emulators.ours, emulators.theirs)
    both = own_introspection()
    for name, entity in comparison.ours.items():
        if entity["meta-type"] in ("command", "event") and name not in both:
            assert name in comparison.theirs, f"{name} is no command or event of QEMU's"
            comparison.command_or_event(name)
    assert comparison.wrong == []
    assert comparison.only_theirs == excused(ONLY_QEMU_EMULATOR)
    assert comparison.only_ours == set()
    assert comparison.optional_here == set()
