"""The emulator's options: the table, and the machine that they describe."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from daemons import PATIENCE

from qmpd.cli import chardev_options, system_options
from qmpd.cli.machine_options import machine_config
from qmpd.cli.options import Option, OptionError
from qmpd.cli.system_options import OPTIONS, Fate, scan
from qmpd.errors import Error
from qmpd.machine import command_line
from qmpd.machine.config import MachineConfig

QEMU = "qemu-system-x86_64"
_UUID = "6d1d0c3e-0000-4000-8000-00000000cafe"

#: What QEMU does not have.
OWN = {
    "cipher-processes",
    "device-exports",
    "export",
    "log",
    "loop",
    "nbd-server",
    "pbkdf-memory-max",
}


def describe(*arguments: str) -> tuple[MachineConfig, str | None]:
    """The machine that options describe, after the checks that each passes."""
    found = list(scan(arguments))
    for option in found:
        system_options.check(option)
    return machine_config(found, "qmpd")


# The table


@pytest.mark.peer(QEMU)
def test_every_option_that_qemus_help_lists_is_known() -> None:
    shown = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
    listed: set[str] = set()
    for line in shown.splitlines():
        found = re.match(r"-(-?[A-Za-z][\w-]*)((?:/-\w+| or -help)*)", line)
        if found:
            listed |= {found[1].lstrip("-"), *re.findall(r"-(\w+)", found[2])}
    assert len(listed) > 100
    assert listed <= OPTIONS.keys()


@pytest.mark.peer(QEMU)
@pytest.mark.parametrize("option", [name for name in OPTIONS if name])
def test_an_option_takes_a_value_if_qemus_does_and_is_qmpds_own_if_qemu_has_none(option: str) -> None:
    # QEMU looks whether all options exist, and have their values, before it does anything.
    ended = subprocess.run(
        [QEMU, f"-{option}", "-first", "-second"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    wrong = option if option in OWN else "first" if OPTIONS[option].value is None else "second"
    assert ended.stderr.splitlines()[0].endswith(f": -{wrong}: invalid option")


def test_every_option_is_explained_accepted_or_refused_with_a_reason() -> None:
    for option in OPTIONS.values():
        assert bool(option.about) == (option.fate in (Fate.ACTS, Fate.REFUSED)), option.name


@pytest.mark.parametrize(
    ("arguments", "name", "value", "text"),
    [
        (["-m", "64"], "m", "64", "-m 64"),
        (["--m", "64"], "m", "64", "--m 64"),
        (["-S"], "S", "", "-S"),
        (["-name", "-S"], "name", "-S", "-name -S"),
        (["disk.img"], "", "disk.img", "disk.img"),
        ([""], "", "", ""),
    ],
)
def test_every_way_to_write_an_option_is_read(arguments: list[str], name: str, value: str, text: str) -> None:
    assert list(scan(arguments)) == [Option(name, value, text)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["---S"], "---S: invalid option"),
        (["-no-shutdown=1"], "-no-shutdown=1: invalid option"),
        (["-no-shut"], "-no-shut: invalid option"),
        (["-"], "-: invalid option"),
        (["--m"], "--m: requires an argument"),
    ],
)
def test_a_wrong_option_is_refused_in_qemus_words(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        list(scan(arguments))
    assert str(refusal.value) == message


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.fate is Fate.REFUSED])
def test_what_would_matter_is_refused_and_the_reason_told(option: system_options.SystemOption) -> None:
    dashed = f"-{option.name}" if option.name else ""
    arguments = [each for each in (dashed, None if option.value is None else "x") if each]
    with pytest.raises(Error) as refusal:
        describe(*arguments)
    assert refusal.value.desc == f"{' '.join(arguments)}: {option.about}"
    for value in option.harmless:
        describe(dashed, value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-sandbox", "on"],
        ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
        ["-run-with", "chroot=/"],
        ["-run-with", "user=nobody"],
        ["-compat", "unstable-input=reject"],
        ["-display", "gtk"],
        ["-display", "vnc=:1"],
        ["-audiodev", "pa,id=a"],
        ["-audio", "none,model=hda"],
        ["-accel", "kvm"],
        ["-machine", "accel=kvm"],
        ["-enable-kvm"],
        ["-machine", "kernel=x"],
        ["-machine", "pflash0=x"],
        ["-machine", "q35,memory-encryption=x"],
    ],
)
def test_nothing_is_promised_that_is_not_kept(arguments: list[str]) -> None:
    with pytest.raises(Error):
        describe(*arguments)


# The machine


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"type": "pc-i440fx-10.0", "memory": 128 << 20, "cpus": 1, "started": True}),
        (["-M", "q35"], {"type": "pc-q35-10.0"}),
        (["-machine", "type=q35,usb=off", "-machine", "hpet=off"], {"type": "pc-q35-10.0"}),
        (["-machine", "q35", "-M", "none"], {"type": "none"}),
        (["-m", "64"], {"memory": 64 << 20}),
        (["-m", "size=65536k"], {"memory": 64 << 20}),
        (["-m", "1.5G,slots=2,maxmem=4G"], {"memory": 3 << 29}),
        (["-m", "63.5k"], {"memory": 65536}),
        (["-m", "64", "-m", "0"], {"memory": 128 << 20}),
        (["-smp", "4,maxcpus=8"], {"cpus": 4}),
        (["-smp", "maxcpus=4"], {"cpus": 4}),
        (["-smp", "cores=4,threads=2"], {"cpus": 8}),
        (["-smp", "2", "-smp", "cpus=3"], {"cpus": 3}),
        (["-machine", "smp.cpus=2"], {"cpus": 2}),
        (["-name", "a,,b,debug-threads=on"], {"name": "a,b"}),
        (["-name", "guest=g"], {"name": "g"}),
        (["-uuid", _UUID.upper()], {"uuid": _UUID}),
        (["-S"], {"started": False}),
        (["-no-shutdown", "-no-reboot"], {"no_shutdown": True, "no_reboot": True}),
        (["-action", "reboot=shutdown,shutdown=pause"], {"no_shutdown": True, "no_reboot": True}),
        (["-no-shutdown", "-action", "shutdown=poweroff"], {"no_shutdown": False}),
    ],
)
def test_options_describe_the_machine(arguments: list[str], expected: dict[str, Any]) -> None:
    config, memory = describe(*arguments)
    assert {name: getattr(config, name) for name in expected} == expected
    assert memory is None


def test_the_machines_memory_may_be_an_object() -> None:
    assert describe("-machine", "q35,memory-backend=ram0")[1] == "ram0"


def test_an_accelerator_that_is_not_there_is_fallen_back_from_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    describe("-machine", "none,accel=kvm:tcg")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("qmpd: failed to initialize kvm: ")
    assert second == "qmpd: falling back to tcg"
    describe("-machine", "none,accel=tcg")
    describe("-accel", "qtest")
    assert capsys.readouterr().err == ""


def test_what_libvirt_writes_is_taken() -> None:
    config, memory = describe(
        *("-name", "guest=d,debug-threads=on", "-S", "-uuid", _UUID, "-m", "size=65536k"),
        *("-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"master-key.aes"}'),
        *("-machine", "pc-q35-10.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on"),
        *("-accel", "tcg", "-cpu", "qemu64", "-overcommit", "mem-lock=off"),
        *("-object", '{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}'),
        *("-smp", "1,sockets=1,cores=1,threads=1", "-display", "none", "-no-user-config", "-nodefaults"),
        *("-chardev", "socket,id=charmonitor,fd=21,server=on,wait=off"),
        *("-mon", "chardev=charmonitor,id=monitor,mode=control", "-rtc", "base=utc", "-no-shutdown"),
        *("-boot", "strict=on", "-audiodev", '{"id":"audio1","driver":"none"}', "-msg", "timestamp=on"),
        *("-global", "ICH9-LPC.noreboot=off", "-watchdog-action", "reset"),
    )
    assert config == MachineConfig(
        type="pc-q35-10.0", name="d", uuid=_UUID, memory=64 << 20, started=False, no_shutdown=True
    )
    assert memory == "pc.ram"


# What clients are told about options


@pytest.mark.peer(QEMU)
def test_clients_are_told_of_no_parameter_that_qemus_option_does_not_have() -> None:
    commands = '{"execute": "qmp_capabilities"}{"execute": "query-command-line-options"}{"execute": "quit"}'
    shown = subprocess.run(
        [QEMU, "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"],
        input=commands,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout
    answers = [json.loads(line).get("return") for line in shown.splitlines()]
    (options,) = [answer for answer in answers if isinstance(answer, list)]
    theirs = {
        option["option"]: {each["name"]: each["type"] for each in option["parameters"]} for option in options
    }
    # What QEMU leaves out of its list, and takes.
    unlisted = {"cxl", "hmat", "nvdimm", "nvdimm-persistence", "pcspk-audiodev"}
    for entry in command_line.options(None):
        name = entry["option"]
        own = {each["name"]: each["type"] for each in entry["parameters"] if each["name"] not in unlisted}
        assert own.items() <= theirs[name].items(), name


def test_clients_are_told_of_no_sandbox() -> None:
    assert "sandbox" not in {entry["option"] for entry in command_line.options(None)}


def test_one_option_can_be_asked_for_and_another_is_refused() -> None:
    (entry,) = command_line.options("mon")
    assert entry["option"] == "mon"
    with pytest.raises(Error, match="invalid option name: nope"):
        list(command_line.options("nope"))


def test_parameters_of_character_devices_are_those_that_these_take() -> None:
    names = command_line.PARAMETERS["chardev"].keys()
    assert names <= chardev_options.CHARDEV_SETTINGS.keys()
    assert not names & set(chardev_options.UNSUPPORTED)
