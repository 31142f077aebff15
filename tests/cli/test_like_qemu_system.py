"""Command lines given to QEMU's emulator and to ours: what is refused, in which words, and what is not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import PATIENCE
from preloaded import Preloaded

#: Both refuse these, with the same words; where QEMU does not say which option it is about, ours does.
WRONG = [
    ["-frobnicate"],
    ["--frobnicate"],
    ["---S"],
    ["--"],
    ["-"],
    ["-machin", "q35"],
    ["-no-shutdown=1"],
    ["-object"],
    ["-m"],
    ["--m"],
    ["-S", "-object"],
    ["-version", "-frobnicate"],
    ["-machine", "help", "-frobnicate"],
    ["-no-acpi"],
    ["-no-hpet"],
    ["-writeconfig", "x"],
    ["-soundhw", "x"],
    ["-runas", "x"],
    ["-xen-attach"],
    ["-prom-env", "x"],
    ["-semihosting"],
    ["-old-param"],
    ["-g", "800x600"],
    *(
        ["-machine", value]
        for value in (
            "q36",
            "type=q36",
            "type=",
            "PC",
            "pc-q35-9.99",
            '{"type":"q36"}',
            "q35,foo=1",
            "none,acpi=on",
            "q35,usb=maybe",
            "q35,usb=",
            "q35,usb=off=3",
            "q35,usb=maybe,foo=1",
            "q35,smm=foo",
            "q35,vmport=foo",
            "q35,hpet=foo",
            "q35,nvdimm=foo",
            "q35,smbios-entry-point-type=foo",
            "q35,max-ram-below-4g=abc",
            "q35,x.y=1",
            "q35,id=x",
            "q35,usb",
            "q35,nousb",
            "q35,,usb=off",
            "usb=off,q35",
            "q35,memory-backend=ram0",
            "accel=nope",
            "accel=nope:nope2",
            "q35,accel=",
        )
    ),
    ["-M", "q36"],
    ["-M", "q35,foo=1,usb=off"],
    ["-accel", "nope"],
    ["-accel", "kvm:tcg"],
    ["-accel", ","],
    ["-accel", "tcg,thread=foo"],
    ["-accel", "tcg,foo=1"],
    ["-accel", "tcg", "-machine", "q35,accel=tcg"],
    ["-cpu", "nope"],
    ["-cpu", ""],
    *(
        ["-smp", value]
        for value in (
            "0",
            "abc",
            "-1",
            "256",
            "cpus=",
            "4,sockets=1,cores=1,threads=1",
            "4,cores=3",
            "4,sockets=0",
            "4,cores=x",
            "4,clusters=2",
            "4,books=2",
            "2,maxcpus=1",
            "2,foo=3",
            "4,foo=1,cores=x",
        )
    ),
    ["-machine", "none", "-smp", "2"],
    ["-machine", "q35", "-smp", "5000"],
    *(
        ["-m", value]
        for value in (
            "abc",
            "size=abc",
            "size=",
            "-1",
            "1e3",
            "64,size=1x",
            "size=64,foo=1",
            "1G,slots=2",
            "1G,slots=2,maxmem=512M",
            "size=1,maxmem=abc",
            "size=1,maxmem=1G,slots=abc",
            "size=1,slots=300,maxmem=4G",
            "maxmem=64M",
        )
    ),
    ["-uuid", "nonsense"],
    ["-uuid", ""],
    ["-uuid", "6d1d0c3e00004000800000000000cafe"],
    ["-uuid", "{6d1d0c3e-0000-4000-8000-00000000cafe}"],
    ["-name", "guest=foo,debug-threads=maybe"],
    ["-name", "guest=foo,bar=1"],
    ["-action", "reboot=foo"],
    ["-action", "panic=foo"],
    ["-action", "foo=x"],
    ["-watchdog-action", "nope"],
    ["-boot", "order=x"],
    ["-boot", "order=cc"],
    ["-boot", "once=z"],
    ["-boot", "foo=1"],
    ["-boot", "menu=maybe"],
    ["-boot", "menu=on,reboot-timeout=abc"],
    ["-boot", "order=c,strict=off,foo"],
    ["-rtc", "base=nonsense"],
    ["-rtc", "clock=foo"],
    ["-rtc", "driftfix=foo"],
    ["-rtc", "foo=1"],
    ["-display", "nope"],
    ["-display", "none,foo=1"],
    ["-display", ""],
    ["-vga", "nope"],
    ["-vga", ""],
    ["-overcommit", "mem-lock=maybe"],
    ["-overcommit", "foo=1"],
    ["-msg", "timestamp=maybe"],
    ["-msg", "foo=1"],
    ["-global", "driver=a,property=b"],
    ["-global", "foo=1"],
    ["-global", ""],
    ["-smbios", "type=99"],
    ["-smbios", "type=1,uuid=nonsense"],
    ["-audiodev", "nope,id=a"],
    ["-audiodev", "none"],
    ["-audiodev", ""],
    ["-audiodev", '{"id":"a"}'],
    ["-audiodev", "{bad"],
    ["-audio", "nope"],
    ["-numa", "nope"],
    ["-numa", ""],
    ["-numa", "node,foo=1"],
    ["-compat", "deprecated-input=foo"],
    ["-compat", "foo=1"],
    ["-run-with", "async-teardown=maybe"],
    ["-run-with", "foo=1"],
    ["-sandbox", "maybe"],
    ["-sandbox", "on,foo=1"],
    ["-sandbox", "on,obsolete=foo"],
    ["-sandbox", "on,elevateprivileges=foo"],
    ["-seed", "abc"],
    ["-trace", "foo=bar"],
    *(
        ["-add-fd", value]
        for value in (
            "fd=99,set=1",
            "fd=0,set=1",
            "set=1",
            "fd=-1,set=1",
            "fd=4294967295,set=1",
            "fd=99999999999,set=1",
            "fd=abc,set=1",
            "fd=99,set=abc",
            "fd=99,set=1,foo=2",
            "",
        )
    ),
    ["-pidfile", "none/pid"],
    ["-mon", "mode=control"],
    ["-mon", ""],
    ["-mon", "chardev=m,mode=control"],
    ["-mon", "chardev=m,mode=foo"],
    ["-mon", "chardev=m,mode=control,foo=1"],
    ["-mon", "chardev=m,mode=control,pretty=maybe"],
    ["-chardev", "null,id=m", "-mon", "m,mode=control", "-mon", "m,mode=control"],
    ["-qmp", "nope"],
    ["-qmp", ""],
    ["-qmp", "none"],
    ["-qmp", "unix:s"],
    ["-qmp", "unix:nope/s,server=on,wait=off"],
    ["-qmp", "unix:s,server=on,wait=off,foo=1"],
    ["-qmp", "tcp:localhost:abc,server=on,wait=off"],
    ["-qmp", "chardev:nope"],
    ["-qmp-pretty", "nope"],
    ["-daemonize", "-qmp", "stdio"],
    ["-chardev", "null"],
    ["-chardev", "nope,id=n"],
    ["-chardev", "null,id=3"],
    ["-chardev", "ringbuf,id=r,size=100"],
    ["-chardev", "ringbuf,id=r,size=x"],
    ["-chardev", "socket,id=a,fd=99,server=on,wait=off"],
    ["-chardev", '{"id":"a"}'],
    ["-object", "nope,id=a"],
    ["-object", ""],
    ["-object", "secret"],
    ["-object", "id=a"],
    ["-object", "secret,id=a"],
    ["-object", '{"qom-type":"secret"}'],
    ["-object", '{"qom-type":"secret"'],
    ["-object", "memory-backend-ram,id=a"],
    ["-object", "memory-backend-ram,id=a,size=0"],
    ["-object", "memory-backend-file,id=a,size=1M"],
    ["-blockdev", ""],
    ["-blockdev", "help"],
    ["-blockdev", "null-co"],
    ["-blockdev", "nope,node-name=a"],
    ["-blockdev", '{"driver":"null-co", bad}'],
    ["-blockdev", "null-co,node-name=a", "-blockdev", "null-co,node-name=a"],
    ["-blockdev", "raw,node-name=r,file=f", "-blockdev", "null-co,node-name=f"],
    ["-device", ""],
    ["-device", "id=x"],
    ["-device", "nope"],
    ["-device", '{"driver":"nope"}'],
    ["-device", '{"driver":"virtio-blk-pci"'],
    ["-device", "virtio-blk-pci"],
    ["-device", "virtio-blk-pci,drive=nope"],
    *(
        ["-blockdev", "null-co,node-name=n", "-device", f"virtio-blk-pci,drive=n,{rest}"]
        for rest in ("id=3", "id=d,foo=1", "id=d,addr=0x99", "id=d,bus=nope")
    ),
    # In which order things are made
    ["-machine", "q36", "-object", "secret,id=a"],
    ["-machine", "q36", "-device", "nope"],
    ["-chardev", "nope,id=a", "-object", "secret,id=a"],
    ["-blockdev", "null-co", "-object", "secret,id=a"],
    ["-blockdev", "null-co", "-chardev", "nope,id=a"],
    ["-blockdev", "null-co", "-qmp", "unix:nope/s,server=on,wait=off"],
    ["-object", "memory-backend-ram,id=a,size=0", "-blockdev", "null-co"],
    ["-device", "nope", "-object", "memory-backend-ram,id=a,size=0"],
    ["-device", "nope", "-machine", "memory-backend=nope"],
    ["-device", "nope", "-blockdev", "null-co"],
]

_UUID = "6d1d0c3e-0000-4000-8000-00000000cafe"

#: Both take these.
RIGHT = [
    ["-S", "--S", "-S"],
    ["-machine", ""],
    ["-machine", "q35,"],
    ["-M", "q35", "-machine", "usb=off"],
    ["-M", "q35", "-M", "pc"],
    ["-machine", "pc,type=q35"],
    ["-machine", "q35,usb=off,dump-guest-core=off,vmport=off,hpet=off,acpi=on,smm=auto,graphics=off"],
    ["-machine", "q35,smp.cpus=2,boot.order=c,memory.size=64M"],
    ["-machine", "q35,kernel_irqchip=on,mem-merge=off,nvdimm=on,max-ram-below-4g=2G"],
    ["-machine", "none,usb=off,accel=tcg"],
    ["-machine", "accel=nope:tcg"],
    ["-accel", "tcg,thread=single"],
    ["-accel", "accel=tcg"],
    ["-cpu", "qemu64,-sse"],
    ["-cpu", "max"],
    ["-smp", ""],
    ["-smp", "1,sockets=1,cores=1,threads=1"],
    ["-smp", "4,maxcpus=8,sockets=2"],
    ["-smp", "4,dies=2"],
    ["-smp", "maxcpus=4"],
    ["-smp", "cores=4"],
    ["-smp", "1,drawers=1"],
    ["-m", "size=65536k"],
    ["-m", "64"],
    ["-m", "1.5G"],
    ["-m", "0"],
    ["-m", ""],
    ["-m", "1G,slots=2,maxmem=4G"],
    ["-m", "maxmem=4G"],
    ["-uuid", _UUID],
    ["-name", ""],
    ["-name", "guest=foo,debug-threads=on,process=bar"],
    ["-action", "shutdown=pause,panic=none,watchdog=none,reboot=shutdown"],
    ["-no-shutdown", "-no-reboot", "-watchdog-action", "reset"],
    ["-boot", "strict=on"],
    ["-boot", "order=cd,once=n,menu=off,reboot-timeout=5"],
    ["-rtc", "base=utc"],
    ["-rtc", "base=2020-01-01T00:00:00,clock=vm,driftfix=slew"],
    ["-display", "none", "-vga", "none", "-nographic", "-serial", "none", "-parallel", "none"],
    ["-monitor", "none", "-serial", "null", "-net", "none", "-vnc", "none"],
    ["-overcommit", "mem-lock=off,cpu-pm=off"],
    ["-global", "ICH9-LPC.noreboot=off", "-global", "driver=a,property=b,value=c"],
    ["-msg", "timestamp=on,guest-name=off"],
    ["-smbios", "type=1,serial=x", "-k", "de", "-no-user-config", "-nodefaults"],
    ["-audiodev", '{"id":"audio1","driver":"none"}'],
    ["-audiodev", "none,id=a"],
    ["-run-with", "async-teardown=on"],
    ["-sandbox", "off"],
    ["-compat", "deprecated-input=accept"],
    ["-seed", "3"],
    [
        "-object",
        '{"qom-type":"memory-backend-ram","id":"pc.ram","size":134217728}',
        "-machine",
        "q35,memory-backend=pc.ram",
    ],
    ["-chardev", "null,id=m", "-mon", "chardev=m,id=monitor,mode=control,pretty=on"],
    ["-chardev", "ringbuf,id=r,size=64k", "-qmp-pretty", "chardev:r"],
    [
        "-device",
        '{"driver":"virtio-blk-pci","drive":"n","id":"d","share-rw":true,"addr":"0x3"}',
        "-blockdev",
        "null-co,node-name=n",
    ],
    ["-device", "virtio-blk-pci,drive=n,share-rw=on,num-queues=2", "-blockdev", "null-co,node-name=n"],
]

#: QEMU would open a window, and listen to the keyboard.
_QUIET = ["-display", "none", "-nodefaults"]
#: What ends a program that has started.
_QUIT = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'

QEMU = ("qemu-system-x86_64",)

Ending = tuple[int, str]


def ending(ended: subprocess.CompletedProcess[str]) -> Ending:
    """The exit status and the first line on standard error, without the program's name."""
    first = (ended.stderr.splitlines() or [""])[0]
    return ended.returncode, first.partition(": ")[2]


def run_qemu(arguments: Sequence[str], directory: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run QEMU's emulator to its end, with *text* on its standard input."""
    return subprocess.run(
        [*QEMU, *arguments],
        cwd=directory,
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


Endings = dict[tuple[str, ...], tuple[Ending, Ending]]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Endings:
    """How QEMU's emulator and ours end with each of them, asked several at a time."""
    root = tmp_path_factory.mktemp("endings")

    def ask(index: int) -> tuple[Ending, Ending]:
        directories = theirs, ours = root / f"{index}-theirs", root / f"{index}-ours"
        for directory in directories:
            directory.mkdir()
        # In front: an option without its value has to stay the last one.
        arguments = [*_QUIET, *WRONG[index]]
        return ending(run_qemu(arguments, theirs)), ending(program.run(*arguments, directory=ours))

    with Preloaded("qmpd.cli.system") as program, ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(map(tuple, WRONG), pool.map(ask, range(len(WRONG))), strict=True))


# The first one waits for some 400 processes.
@pytest.mark.timeout(600)
@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_line_is_refused_in_qemus_words(arguments: list[str], endings: Endings) -> None:
    (status, expected), (own_status, own) = endings[tuple(arguments)]
    assert expected
    assert own_status == status == 1
    option = f"{arguments[-2]} {arguments[-1]}: " if len(arguments) > 1 else ""
    assert own == expected or own.startswith(expected) or own.removeprefix(option) == expected


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded("qmpd.cli.system") as ours:
        yield ours


@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("arguments", RIGHT, ids=" ".join)
def test_a_right_command_line_is_taken_by_both(
    arguments: list[str], tmp_path: Path, preloaded: Preloaded
) -> None:
    arguments = [*_QUIET, *arguments, "-qmp", "stdio"]
    assert run_qemu(arguments, tmp_path, _QUIT).returncode == 0
    result = preloaded.run(*arguments, directory=tmp_path, text=_QUIT)
    assert (result.returncode, result.stderr) == (0, WARNINGS.get(arguments[4], ""))


#: What is said about those that are taken after all.
WARNINGS = {
    "accel=nope:tcg": "qmpd-system-x86_64: invalid accelerator nope\n"
    "qmpd-system-x86_64: falling back to tcg\n"
}
