"""The emulator from outside: questions, what it makes and in which order, and its life as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import CHECKOUT, PATIENCE, Connection
from preloaded import Preloaded

from qmpd.cli.system import PROGRAM, _in_order
from qmpd.cli.system_options import OPTIONS, Fate, scan

EMULATOR = (sys.executable, "-m", "qmpd.cli.system")

#: What ends a program that has started.
_NEGOTIATE = '{"execute": "qmp_capabilities"}\n'
_QUIT = '{"execute": "quit"}\n'


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded("qmpd.cli.system") as emulator:
        yield emulator


def answer(preloaded: Preloaded, directory: Path, *arguments: str) -> str:
    """What the emulator answers to a question on the command line."""
    result = preloaded.run(*arguments, directory=directory)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def converse(preloaded: Preloaded, directory: Path, *arguments: str, commands: str = "") -> list[object]:
    """What an emulator with these options returns to commands, before it is told to end."""
    text = _NEGOTIATE + commands + _QUIT
    result = preloaded.run(*arguments, "-S", "-qmp", "stdio", directory=directory, text=text)
    assert (result.returncode, result.stderr) == (0, "")
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    return [reply["return"] for reply in replies if "return" in reply][1:-1]


def command(name: str, **arguments: object) -> str:
    return json.dumps({"execute": name, "arguments": arguments}) + "\n"


# Questions


@pytest.mark.parametrize("option", ["-version", "--version"])
def test_the_version_begins_as_tools_look_for_it_and_says_who_it_is(
    option: str, tmp_path: Path, preloaded: Preloaded
) -> None:
    first, second = answer(preloaded, tmp_path, option).splitlines()
    assert first.startswith("QEMU emulator version 10.0.2 (qmpd ")
    assert second.startswith(f"{PROGRAM} is no QEMU")


@pytest.mark.parametrize("option", ["-h", "-help", "--help"])
def test_help_says_what_it_is_not_and_names_every_option(
    option: str, tmp_path: Path, preloaded: Preloaded
) -> None:
    text = answer(preloaded, tmp_path, "-machine", "q36", option)
    assert max(map(len, text.splitlines())) < 80
    assert "no guest" in text
    assert "-display none" in text
    assert "-sandbox off" in text
    words = set(text.replace(":", " ").split())
    for known in OPTIONS.values():
        assert known.fate is Fate.FOREIGN or not known.name or f"-{known.name}" in words, known.name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-machine", "help"], "pc-i440fx-10.0       a PCI bus (default)"),
        (["-M", "?"], "q35                  a PCI Express bus (alias of pc-q35-10.0)"),
        (["-machine", "q35,help"], "  acpi=<OnOffAuto>"),
        (["-accel", "help"], "tcg"),
        (["-cpu", "help"], "  qemu64"),
        (["-device", "help"], 'name "virtio-blk-pci", bus PCI, alias "virtio-blk"'),
        (["-device", "virtio-blk-pci,help"], "  share-rw=<bool> (default: off)"),
        (["-device", "virtio-blk,?"], "virtio-blk-pci options:"),
        (["-object", "help"], "  secret"),
        (["-object", "secret,help"], "  data=<string>"),
        (["-chardev", "help"], "  socket"),
        (["-display", "help"], "none"),
        (["-audiodev", "help"], "none"),
    ],
)
def test_what_there_is_can_be_asked_for(
    arguments: list[str], line: str, tmp_path: Path, preloaded: Preloaded
) -> None:
    assert line in answer(preloaded, tmp_path, *arguments).splitlines()


# What it makes


def test_things_are_made_in_qemus_order_and_clients_are_served_last() -> None:
    found = scan(
        [
            *("-device", "d0", "-mon", "m0", "-qmp", "q0", "-blockdev", "b0", "-chardev", "c0"),
            *("-object", "memory-backend-ram,id=a", "-object", '{"qom-type": "memory-backend-file"}'),
            *(
                "-object",
                "secret,id=memory-backend-ram,data=qom-type=memory-backend-ram",
                "-blockdev",
                "b1",
                "-device-exports",
                "on",
            ),
            *("-export", "e0", "-nbd-server", "n0", "-add-fd", "f0", "-chardev", "c1"),
        ]
    )
    assert [(option.name, option.value) for option in _in_order(list(found))] == [
        ("add-fd", "f0"),
        ("emulator-object", "secret,id=memory-backend-ram,data=qom-type=memory-backend-ram"),
        ("qmp-chardev", "q0"),
        ("emulator-chardev", "c0"),
        ("emulator-chardev", "c1"),
        ("blockdev", "b0"),
        ("blockdev", "b1"),
        ("memory-backend", "memory-backend-ram,id=a"),
        ("memory-backend", '{"qom-type": "memory-backend-file"}'),
        ("nbd-server", "n0"),
        ("export", "e0"),
        ("device-exports", "on"),
        ("device", "d0"),
        ("mon", "m0"),
        ("qmp-monitor", "q0"),
    ]


def test_a_disk_that_is_described_before_its_parts_is_there_for_the_first_command(
    tmp_path: Path, preloaded: Preloaded
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (disk,), status = converse(
        preloaded,
        tmp_path,
        *("-device", '{"driver": "virtio-blk-pci", "drive": "raw", "id": "vda", "share-rw": true}'),
        *("-blockdev", "file,node-name=file,filename=disk.img"),
        *("-blockdev", '{"driver": "raw", "node-name": "raw", "file": "file"}'),
        *("-name", "guest=g", "-M", "pc"),
        commands=command("query-block") + command("query-status"),
    )
    assert disk["qdev"] == "/machine/peripheral/vda/virtio-backend"
    assert status == {"status": "prelaunch", "running": False}


def test_a_client_is_told_of_the_options_the_memory_and_the_name(
    tmp_path: Path, preloaded: Preloaded
) -> None:
    (option,), memory, name = converse(
        preloaded,
        tmp_path,
        *("-m", "64", "-name", "guest=g"),
        commands=command("query-command-line-options", option="overcommit")
        + command("query-memory-size-summary")
        + command("query-name"),
    )
    assert option["option"] == "overcommit"
    assert {"name": "cpu-pm", "type": "boolean"} in option["parameters"]
    assert memory == {"base-memory": 64 << 20, "plugged-memory": 0}
    assert name == {"name": "g"}


def test_memory_that_is_an_object_is_in_the_tree_and_in_use(tmp_path: Path, preloaded: Preloaded) -> None:
    text = _NEGOTIATE + command("qom-get", path="/objects/ram0", property="size")
    text += command("object-del", id="ram0") + command("object-del", id="ram1") + _QUIT
    result = preloaded.run(
        *("-object", "memory-backend-ram,id=ram0,size=128M", "-machine", "q35,memory-backend=ram0"),
        *("-object", "memory-backend-file,id=ram1,size=1M,mem-path=none", "-qmp", "stdio"),
        directory=tmp_path,
        text=text,
    )
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert {"return": 128 << 20} in replies
    errors = [reply["error"]["desc"] for reply in replies if "error" in reply]
    assert errors == ["object 'ram0' is in use, can not be deleted"]


def test_clients_cannot_make_memory(tmp_path: Path, preloaded: Preloaded) -> None:
    options = {"qom-type": "memory-backend-ram", "id": "r", "size": 1 << 20}
    text = _NEGOTIATE + command("object-add", **options) + _QUIT
    result = preloaded.run("-qmp", "stdio", directory=tmp_path, text=text)
    assert "Parameter 'qom-type' does not accept value 'memory-backend-ram'" in result.stdout


def test_an_inherited_descriptor_is_put_into_a_set(tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("w+b") as disk:
        disk.truncate(1 << 20)
        number = disk.fileno()
        result = subprocess.run(
            [
                *(*EMULATOR, "-qmp", "stdio", "-add-fd", f"fd={number},set=7,opaque=the disk"),
                *("-blockdev", "file,node-name=n,filename=/dev/fdset/7"),
            ],
            pass_fds=[number],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            input=_NEGOTIATE + command("query-fdsets") + command("query-named-block-nodes") + _QUIT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    replies = [json.loads(line).get("return") for line in result.stdout.splitlines()]
    fdsets, nodes = replies[2:4]
    assert (fdsets[0]["fdset-id"], fdsets[0]["fds"][0]["opaque"]) == (7, "the disk")
    assert nodes[0]["node-name"] == "n"


@pytest.mark.parametrize(
    "value",
    [
        "secret,id=s,data=hunter2,format=rot13",
        "secret,id=s,data=hun,ter2",
        '{"qom-type": "secret", "id": "s", "data": "hunter2", "x": 1}',
        "memory-backend-ram,id=s,data=hunter2",
    ],
)
def test_no_passphrase_is_in_an_error(value: str, tmp_path: Path, preloaded: Preloaded) -> None:
    result = preloaded.run("-object", value, directory=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{PROGRAM}: -object ")
    for part in ("hunter2", "hun", "ter2"):
        assert part not in result.stderr


def test_qtest_is_answered_that_nothing_was_done(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qtest"))
    listener.listen()
    listener.settimeout(PATIENCE)
    process = subprocess.Popen(
        [*EMULATOR, "-qtest", "unix:qtest", "-accel", "qtest"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    try:
        harness, _ = listener.accept()
        harness.settimeout(PATIENCE)
        harness.sendall(b"clock_step 1\nread 0x0 4\n")
        with harness.makefile("rb") as replies:
            assert [replies.readline()[:5] for _ in range(2)] == [b"FAIL "] * 2
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


# The process


def test_the_background_is_ready_when_the_parent_ends(tmp_path: Path) -> None:
    """What libvirt's probing relies on."""
    with (tmp_path / "output").open("wb") as output:
        ended = subprocess.run(
            [
                *(*EMULATOR, "-S", "-no-user-config", "-nodefaults", "-nographic"),
                *("-machine", "none,accel=tcg", "-qmp", "unix:qmp.monitor,server=on,wait=off"),
                *("-pidfile", "qmp.pid", "-daemonize"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            stdout=output,
            stderr=output,
            timeout=PATIENCE,
            check=False,
        )
        assert ended.returncode == 0, (tmp_path / "output").read_text()
        process_id = int((tmp_path / "qmp.pid").read_text())
        try:
            with Connection(tmp_path / "qmp.monitor") as client:
                assert client.execute("query-status")["status"] == "prelaunch"
            for descriptor in (1, 2):
                assert os.readlink(f"/proc/{process_id}/fd/{descriptor}") == os.devnull
        finally:
            os.kill(process_id, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while (tmp_path / "qmp.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "qmp.monitor").exists()


def test_the_background_that_cannot_start_says_why(tmp_path: Path, preloaded: Preloaded) -> None:
    result = preloaded.run("-daemonize", "-device", "nope", directory=tmp_path)
    assert (result.returncode, result.stderr) == (
        1,
        f"{PROGRAM}: -device nope: 'nope' is not a valid device model name\n",
    )


def test_a_monitor_on_a_passed_socket_is_the_clients_as_libvirt_does_it(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    path = tmp_path / "monitor.sock"
    listener.bind(str(path))
    listener.listen()
    number = listener.fileno()
    process = subprocess.Popen(
        [
            *(*EMULATOR, "-S", "-chardev", f"socket,id=charmonitor,fd={number},server=on,wait=off"),
            *("-mon", "chardev=charmonitor,id=monitor,mode=control"),
        ],
        pass_fds=[number],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    try:
        # The second one is what a libvirt does that was started anew.
        for _ in range(2):
            with Connection(path) as client:
                assert client.execute("query-status")["status"] == "prelaunch"
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
