"""The emulator's command line, in qemu-system's spelling: one dash or two, the value in the next argument.

:data:`OPTIONS` has every option that QEMU's emulator for x86_64 takes, and a few
of qmpd's own, and says what becomes of each (:class:`Fate`).  It is the one table
that the options are read by, and that ``-help`` is made of.

What can't matter to a machine without a processor, a guest, a display, sound and
a network is accepted, so that command lines that were written for QEMU can be
used unchanged; what would matter is refused, as leaving it out would change what
is promised.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpd.cli import machine_options, option_values
from qmpd.cli.option_values import Check
from qmpd.cli.options import Option, OptionError, naming
from qmpd.errors import Error


class Fate(enum.Enum):
    """What becomes of an option."""

    ACTS = enum.auto()
    #: Its value is checked, and it changes nothing.
    ACCEPTED = enum.auto()
    REFUSED = enum.auto()
    #: QEMU has it for machines of other architectures, and refuses it for this one.
    FOREIGN = enum.auto()


@dataclass(frozen=True, slots=True)
class SystemOption:
    """One option.

    :param value: what its value is called in ``-help``; None if it takes none.
    :param about: what it does, or why it is refused.
    :param check: looks at the value.
    :param harmless: values with which an option that is refused is accepted after all.
    """

    name: str
    fate: Fate
    value: str | None = None
    about: str = ""
    check: Check | None = None
    harmless: tuple[str, ...] = ()


def _acts(name: str, value: str | None, about: str, check: Check | None = None) -> SystemOption:
    return SystemOption(name, Fate.ACTS, value, about, check)


def _accepted(names: str, value: str | None = None, check: Check | None = None) -> Iterator[SystemOption]:
    for name in names.split():
        yield SystemOption(name, Fate.ACCEPTED, value, check=check)


def _refused(
    names: str, why: str, value: str | None = "VALUE", harmless: tuple[str, ...] = ()
) -> Iterator[SystemOption]:
    for name in names.split():
        yield SystemOption(name, Fate.REFUSED, value, why, harmless=harmless)


_CHARDEV: Final = "unix:PATH | tcp:HOST:PORT [,server=on][,wait=off] | chardev:ID | stdio"

_TABLE: Final = (
    # The machine
    _acts(
        "machine",
        "[type=]NAME[,PROPERTY=VALUE]...",
        "the type of machine: `-machine help' lists them",
        machine_options.check_machine,
    ),
    _acts("M", "NAME", "the same as -machine", machine_options.check_machine),
    _acts(
        "m",
        "[size=]SIZE",
        "how much memory it has on paper (default: 128M)",
        machine_options.check_memory,
    ),
    _acts("smp", "[cpus=]N", "how many processors it has on paper (default: 1)"),
    _acts("name", "[guest=]NAME", "its name", option_values.checks("name", "guest")),
    _acts("uuid", "UUID", "its UUID", option_values.check_uuid),
    _acts("S", None, "it does not run until `cont'"),
    _acts("no-shutdown", None, "the process lives on when the machine is switched off"),
    _acts("no-reboot", None, "a reset switches the machine off"),
    _acts(
        "action",
        "reboot=reset|shutdown,shutdown=poweroff|pause",
        "the same as an option",
        option_values.check_action,
    ),
    # What is in it
    _acts("object", "TYPE,id=ID[,PROPERTY=VALUE]...", "an object: `-object help' lists the types"),
    _acts("blockdev", "DRIVER,node-name=NAME[,OPTION=VALUE]...", "a block node"),
    _acts(
        "device",
        "DRIVER[,id=ID][,PROPERTY=VALUE]...",
        "a device: `-device help' lists the models, `-device MODEL,help' their properties",
    ),
    _acts(
        "add-fd",
        "fd=FD,set=SET[,opaque=TEXT]",
        "put an inherited descriptor into /dev/fdset/SET",
        option_values.check_passed_descriptor,
    ),
    # Who may talk to it
    _acts(
        "chardev",
        "socket,id=ID,path=PATH | host=HOST,port=PORT | fd=FD [,server=on|off][,wait=on|off]",
        "a socket; `-chardev help' lists the other kinds",
    ),
    _acts("mon", "[chardev=]ID,mode=control[,pretty=on|off]", "speak QMP on a character device"),
    _acts("qmp", _CHARDEV, "speak QMP there"),
    _acts("qmp-pretty", _CHARDEV, "the same, with indented replies"),
    _acts("qtest", _CHARDEV, "answer every line of the qtest protocol with FAIL"),
    # The process
    _acts("pidfile", "PATH", "write the process id to PATH; removed on exit"),
    _acts("daemonize", None, "go to the background once everything is ready"),
    _acts("h", None, "the same as -help"),
    _acts("help", None, "show this and exit"),
    _acts("version", None, "show the version and exit"),
    # qmpd's own
    _acts("nbd-server", "addr.type=unix,addr.path=PATH | addr.type=inet,...", "the NBD server"),
    _acts("export", "nbd,id=ID,node-name=NAME[,name=NAME]...", "serve a block node to NBD clients"),
    _acts("device-exports", "on|off", "serve every disk that is plugged in to NBD clients (default: off)"),
    _acts("cipher-processes", "N|auto", "processes that cipher long requests"),
    _acts("pbkdf-memory-max", "SIZE", "memory that deriving keys may take at a time"),
    _acts("log", "LEVEL", "error, warning (default), info or debug"),
    _acts("loop", "LOOP", "auto (default), uvloop or asyncio"),
    # What can't matter
    *_accepted("accel", "tcg|qtest", machine_options.check_accel),
    *_accepted("cpu", "MODEL", option_values.check_cpu),
    *_accepted("numa", "VALUE", option_values.check_numa),
    *_accepted("boot", "VALUE", option_values.check_boot),
    *_accepted("rtc", "VALUE", option_values.check_rtc),
    *_accepted("global", "VALUE", option_values.check_global),
    *_accepted("msg", "VALUE", option_values.checks("msg")),
    *_accepted("overcommit", "VALUE", option_values.check_overcommit),
    *_accepted("smbios", "VALUE", option_values.check_smbios),
    *_accepted("display", "none", option_values.check_display),
    *_accepted(
        "vga",
        "VALUE",
        option_values.one_of("none std cirrus vmware qxl xenfb tcx cg3 virtio", "unknown vga type: {}"),
    ),
    *_accepted("audiodev", "none,id=ID", option_values.check_audiodev),
    *_accepted("audio", "none", option_values.check_audio),
    *_accepted("watchdog-action", "VALUE", option_values.check_watchdog_action),
    *_accepted("run-with", "async-teardown=on|off", option_values.check_run_with),
    *_accepted("sandbox", "off", option_values.check_sandbox),
    *_accepted("compat", "VALUE", option_values.check_compat),
    *_accepted("trace", "VALUE", option_values.checks("trace", "enable")),
    *_accepted("seed", "N", option_values.check_seed),
    *_accepted(
        "acpitable bios D d dfilter echr fw_cfg icount k L mem-path option-rom qtest-log xen-domid", "VALUE"
    ),
    *_accepted(
        "enable-sync-profile full-screen jitdump mem-prealloc nodefaults no-fd-bootchk no-user-config"
        " nographic only-migratable perfmap usb win2k-hack"
    ),
    # What would matter
    SystemOption("", Fate.REFUSED, "IMAGE", "a disk is given with -blockdev and -device"),
    *_refused(
        "cdrom drive fda fdb hda hdb hdc hdd mtdblock pflash sd", "a disk is given with -blockdev and -device"
    ),
    *_refused("snapshot", "what is written to disks is written to them", None),
    *_refused("fsdev virtfs", "no files are shared with a guest"),
    *_refused("iscsi", "there is no iSCSI driver"),
    *_refused("append dtb initrd kernel shim", "there is no guest that could boot"),
    *_refused("net netdev nic", "there is no network", harmless=("none",)),
    *_refused("spice vnc", "there is no display", harmless=("none",)),
    *_refused("usbdevice", "there are no USB devices"),
    *_refused("tpmdev", "there is no TPM"),
    *_refused(
        "debugcon parallel serial", "there are no serial and parallel ports", harmless=("none", "null")
    ),
    *_refused("monitor", "a monitor speaks QMP here (-qmp); no text for people", harmless=("none", "null")),
    *_refused("gdb", "there is no processor to debug", harmless=("none",)),
    *_refused("s", "there is no processor to debug", None),
    *_refused("incoming loadvm", "there is no state that could be loaded"),
    *_refused("dump-vmstate", "there is no state that could be described"),
    *_refused("preconfig", "the machine is complete from the start", None),
    *_refused("enable-kvm", "there is no processor that KVM could run", None),
    *_refused("readconfig", "options are only read from the command line"),
    *_refused("set", "give the value where the thing itself is described"),
    *_refused("plugin", "there is no processor to watch"),
    # Other architectures
    *(
        SystemOption(name, Fate.FOREIGN, value)
        for name, value in (
            ("g", "VALUE"),
            ("old-param", None),
            ("prom-env", "VALUE"),
            ("semihosting", None),
            ("semihosting-config", "VALUE"),
            ("xen-attach", None),
            ("xen-domid-restrict", None),
        )
    ),
)

#: All options there are.  An argument that belongs to none (QEMU: a disk's image) has an empty name.
OPTIONS: Final[Mapping[str, SystemOption]] = {option.name: option for option in _TABLE}


def scan(arguments: Sequence[str]) -> Iterator[Option]:
    """Cut the arguments (without the program's name) into options, lazily and in order.

    :raise OptionError: in QEMU's words, when the wrong argument is reached.
    """
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("-"):
            yield Option("", argument, argument)
            continue
        # QEMU takes two dashes for one, and no third.
        name = argument[2:] if argument.startswith("--") else argument[1:]
        if not name or name not in OPTIONS:
            raise OptionError(f"{argument}: invalid option")
        if OPTIONS[name].value is None:
            yield Option(name, "", argument)
            continue
        value = next(waiting, None)
        if value is None:
            raise OptionError(f"{argument}: requires an argument")
        yield Option(name, value, f"{argument} {value}")


def check(option: Option) -> None:
    """See that an option may be given, with this value.

    :raise Error: with the option in front.
    """
    known = OPTIONS[option.name]
    with naming(option):
        if known.fate is Fate.FOREIGN:
            raise Error("Option not supported for this target")
        if known.fate is Fate.REFUSED and option.value not in known.harmless:
            raise Error(known.about)
        if known.check is not None:
            known.check(option.value)
