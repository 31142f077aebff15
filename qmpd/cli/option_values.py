"""What the values of an emulator's options must look like.

Most options of an emulator can't matter to a machine without a processor, a
guest, a display and sound.  A typing error in them is refused all the same, as
QEMU refuses it: a function here takes a value and returns nothing, or raises
:class:`qmpd.errors.Error` in QEMU's words.

Learnt from ``qemu-system-x86_64``'s behaviour and errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from qmpd.cli.options import Nameless
from qmpd.errors import Error
from qmpd.machine import cpu_models
from qmpd.machine.command_line import PARAMETERS
from qmpd.qapi import keyval
from qmpd.qapi.settings import HelpRequested, Kind, parse_settings
from qmpd.qjson import parse_json

#: Looks at an option's value.
Check = Callable[[str], None]

_KINDS: Final[Mapping[str, Kind]] = {
    "string": Kind.TEXT,
    "boolean": Kind.SWITCH,
    "number": Kind.NUMBER,
    "size": Kind.SIZE,
}


def settings(group: str, text: str, implied_key: str | None = None) -> dict[str, Any]:
    """Read ``key=value,...`` with the parameters that `query-command-line-options` lists for an option.

    :param group: the option's name there.
    :raise Error: in QEMU's words.
    """
    known = {name: _KINDS[type_] for name, type_ in PARAMETERS[group].items()}
    try:
        return parse_settings(text, known, implied_key)
    except HelpRequested:
        raise Error("Help is not available for this option") from None


def number(key: str, value: str) -> int:
    """Return what an option of the nested dialect has for a number.

    :raise Error: in QEMU's words.
    """
    if not re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|[0-9]{1,18})", value):
        raise Error(f"Parameter '{key}' expects integer")
    return int(value, 16 if "x" in value.lower() else 10)


def checks(group: str, implied_key: str | None = None) -> Check:
    """A check for options whose parameters are all that can be wrong with them."""

    def check(text: str) -> None:
        settings(group, text, implied_key)

    return check


def one_of(values: str, wording: str) -> Check:
    """A check for options that have one word for a value.

    :param values: the words, separated by spaces.
    :param wording: what is said of another; ``{}`` stands for it.
    """
    known = frozenset(values.split())

    def check(text: str) -> None:
        if text not in known:
            raise Error(wording.format(text))

    return check


def choice(
    given: Mapping[str, Any], name: str, values: str, wording: str, refusal: type[Error] = Error
) -> None:
    """Check one parameter that has a few words for values.

    :param given: the parameters that were given.
    :param values: the words, separated by spaces.
    :param wording: what is said of another one; ``{name}`` and ``{value}`` stand for the two.
    :raise Error: if it is none of them.
    """
    if name in given and given[name] not in values.split():
        raise refusal(wording.format(name=name, value=given[name]))


#: What is said of a word that a parameter does not take.
NOT_ACCEPTED: Final = "Parameter '{name}' does not accept value '{value}'"

_ACTIONS: Final[Mapping[str, str]] = {
    "reboot": "reset shutdown",
    "shutdown": "poweroff pause",
    "panic": "pause shutdown exit-failure none",
    "watchdog": "reset shutdown poweroff inject-nmi pause debug none",
}


def action(text: str) -> dict[str, Any]:
    """Read ``-action``: what is done about which event."""
    given = settings("action", text)
    for event, values in _ACTIONS.items():
        choice(given, event, values, NOT_ACCEPTED)
    return given


def check_action(text: str) -> None:
    """``-action``."""
    action(text)


check_watchdog_action: Final = one_of(_ACTIONS["watchdog"], "Parameter 'watchdog' does not accept value '{}'")


def passed_descriptor(text: str) -> tuple[int, int, str | None]:
    """Read ``-add-fd``: a descriptor, the number of the set that it is for, and what is remembered of it.

    :raise Error: in QEMU's words.
    """
    given = settings("add-fd", text)
    descriptor, fdset = (_c_int(given.get(name, -1)) for name in ("fd", "set"))
    if 0 <= descriptor <= 2:
        raise Error("fd cannot be a standard I/O stream")
    if descriptor < 0:
        raise Error("fd option is required and must be non-negative")
    if fdset < 0:
        raise Error("set option is required and must be non-negative")
    return descriptor, fdset, given.get("opaque")


def _c_int(number: int) -> int:
    """The number in the 32 bits that QEMU keeps of it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def check_passed_descriptor(text: str) -> None:
    """``-add-fd``: its form; whether there is such a descriptor is seen when it is taken."""
    settings("add-fd", text)


def check_boot(text: str) -> None:
    """``-boot``: an order of drives that are letters, and a menu that nobody sees."""
    given = keyval.parse(text, "order")
    for name, value in given.items():
        known = PARAMETERS["boot-opts"].get(name)
        if known is None:
            raise Nameless(f"Parameter 'boot.{name}' is unexpected")
        if known == "number":
            number(f"boot.{name}", value)
        if known == "boolean" and value not in keyval.SWITCH:
            raise Nameless(f"Parameter 'boot.{name}' expects 'on' or 'off'")
    for name in ("order", "once"):
        letters = given.get(name, "")
        for position, letter in enumerate(letters):
            if not "a" <= letter <= "p":
                raise Nameless(f"Invalid boot device '{letter}'")
            if letter in letters[:position]:
                raise Nameless(f"Boot device '{letter}' was given twice")


def check_rtc(text: str) -> None:
    """``-rtc``: a clock that nobody reads."""
    given = settings("rtc", text)
    base = given.get("base", "utc")
    if base not in ("utc", "localtime") and not re.fullmatch(r"\d+-\d+-\d+(T\d+:\d+:\d+)?", base, re.ASCII):
        raise Nameless(
            "invalid datetime format", hint="utc, localtime, 2006-06-17 and 2006-06-17T16:01:21 are valid"
        )
    choice(given, "clock", "host rt vm", "invalid option value '{value}'", Nameless)
    choice(given, "driftfix", "none slew", "invalid option value '{value}'", Nameless)


def check_overcommit(text: str) -> None:
    """``-overcommit``: the guest's memory, of which there is none."""
    choice(
        settings("overcommit", text),
        "mem-lock",
        "on off on-fault",
        "parameter '{name}' expects one of 'on', 'off', 'on-fault'",
    )


def check_smbios(text: str) -> None:
    """``-smbios``: tables that no firmware shows."""
    try:
        given = parse_settings(text, None)
    except HelpRequested:
        raise Error("Must specify type= or file=") from None
    if "file" in given:
        return
    if "type" not in given:
        raise Error("Must specify type= or file=")
    if given["type"] not in ["0", "1", "2", "3", "4", "8", "9", "11", "17", "41"]:
        raise Error(f"Don't know how to build fields for SMBIOS type {given['type']}")
    if "uuid" in given and not UUID.fullmatch(given["uuid"]):
        raise Error("Invalid UUID")


#: A UUID as options have it.
UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


def check_uuid(text: str) -> None:
    """``-uuid``."""
    if not UUID.fullmatch(text):
        raise Error("failed to parse UUID string: wrong format")


def check_global(text: str) -> None:
    """``-global``: a default of a property."""
    if re.fullmatch(r"[^.=,]+\.[^=]+=.*", text, re.DOTALL):
        return
    if settings("global", text).keys() < {"driver", "property", "value"}:
        raise Error("options 'driver', 'property', and 'value' are required")


def check_display(text: str) -> None:
    """``-display``: only none is there."""
    kind, comma, rest = text.partition(",")
    if not kind:
        raise Error("Parameter 'type' is missing")
    if re.split("[,=]", text)[0] in _DISPLAYS:
        raise Error("there is no display; -display none is taken")
    if kind != "none":
        raise Error(f"Parameter 'type' does not accept value '{kind}'")
    if comma and rest:
        raise Error(f"Parameter '{rest.partition('=')[0]}' is unexpected")


_DISPLAYS: Final = frozenset(["curses", "dbus", "default", "egl-headless", "gtk", "sdl", "spice-app", "vnc"])

_AUDIO_DRIVERS: Final = frozenset(["alsa", "dbus", "jack", "oss", "pa", "pipewire", "sdl", "spice", "wav"])


def _check_audio_driver(given: Mapping[str, Any]) -> None:
    if "driver" not in given:
        raise Error("Parameter 'driver' is missing")
    if given["driver"] in _AUDIO_DRIVERS:
        raise Error("there is no sound; only the driver none is taken")
    if given["driver"] != "none":
        raise Error(f"Parameter 'driver' does not accept value '{given['driver']}'")


def check_audiodev(text: str) -> None:
    """``-audiodev``: only the driver none is there."""
    given = parse_json(text) if text.startswith("{") else keyval.parse(text, "driver")
    if "id" not in given:
        raise Error("Parameter 'id' is missing")
    _check_audio_driver(given)


def check_audio(text: str) -> None:
    """``-audio``: only the driver none is there, and no sound card."""
    given = keyval.parse(text, "driver")
    _check_audio_driver(given)
    if "model" in given:
        raise Error("there are no sound cards")


def check_compat(text: str) -> None:
    """``-compat``: nothing is deprecated or unstable here, so only accepting such things is taken."""
    values = {"input": "accept reject crash", "output": "accept hide"}
    given = keyval.parse(text)
    for name, value in given.items():
        policy, _, direction = name.partition("-")
        if policy not in ("deprecated", "unstable") or direction not in values:
            raise Error(f"Parameter '{name}' is unexpected")
        choice(given, name, values[direction], NOT_ACCEPTED)
        if value != "accept":
            raise Error(f"'{name}={value}' is not supported by qmpd")


def check_numa(text: str) -> None:
    """``-numa``: where memory is that there is none of."""
    given = parse_settings(text, None, "type")
    if "type" not in given:
        raise Error("Parameter 'type' is missing")
    known = _NUMA.get(given["type"])
    if known is None:
        raise Error(f"Parameter 'type' does not accept value '{given['type']}'")
    for name in given:
        if name not in ("type", *known.split()):
            raise Error(f"Invalid parameter '{name}'")


_NUMA: Final[Mapping[str, str]] = {
    "node": "nodeid cpus mem memdev initiator",
    "dist": "src dst val",
    "cpu": "node-id socket-id die-id core-id thread-id module-id cluster-id book-id drawer-id",
    "hmat-lb": "initiator target hierarchy data-type latency bandwidth",
    "hmat-cache": "node-id size level associativity policy line",
}


def check_run_with(text: str) -> None:
    """``-run-with``: async-teardown only, as only that can't matter."""
    for name in ("chroot", "user"):
        if re.search(rf"(\A|,){name}=", text):
            raise Error(f"'{name}' is not supported by qmpd")
    settings("run-with", text)


def check_sandbox(text: str) -> None:
    """``-sandbox off``, as there is no sandbox."""
    known = {"enable": Kind.SWITCH} | dict.fromkeys(
        ("obsolete", "elevateprivileges", "spawn", "resourcecontrol"), Kind.TEXT
    )
    given = parse_settings(text, known, "enable")
    for name, value in given.items():
        allowed = "allow deny children" if name == "elevateprivileges" else "allow deny"
        if name != "enable" and value not in allowed.split():
            raise Error(f"invalid argument for {name}")
    if given.get("enable"):
        raise Error("qmpd has no sandbox; leave it out, or use systemd's SystemCallFilter=")


def check_seed(text: str) -> None:
    """``-seed``: a number."""
    if not re.fullmatch(r"\s*[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)", text):
        raise Error(f"Invalid seed number: {text}")


def check_cpu(text: str) -> None:
    """``-cpu``: the name of a model that QEMU has."""
    model, *features = text.split(",")
    if not model:
        raise Error("-cpu option cannot be empty")
    if model == "host":
        raise Nameless("CPU model 'host' requires KVM or HVF")
    name, dash, version = model.rpartition("-v")
    if model not in cpu_models.NAMES and not (dash and version.isdecimal() and name in cpu_models.NAMES):
        raise Nameless(f"unable to find CPU model '{model}'")
    for feature in features:
        if not re.fullmatch(r"[+-]?[a-zA-Z0-9][a-zA-Z0-9._-]*(=.*)?", feature, re.DOTALL):
            raise Error(f"'{feature}' is no feature of a processor")
