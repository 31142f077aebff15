"""The program from outside: exit status, standard output, standard error, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartDaemon
from daemons import CHECKOUT, PATIENCE, QMPD, Connection
from preloaded import Preloaded

from qmpd import __version__


def run(*arguments: str, directory: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run qmpd to its end, with *text* on its standard input."""
    return subprocess.run(
        [*QMPD, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("option", ["--version", "-V", "--vers"])
def test_the_version_is_told(option: str, tmp_path: Path) -> None:
    result = run(option, directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"qmpd version {__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h", "--he"])
def test_help_fits_a_terminal_and_names_every_option(option: str, tmp_path: Path) -> None:
    result = run(option, directory=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) < 80
    for name in ("object", "blockdev", "chardev", "monitor", "pidfile", "daemonize", "version", "help"):
        assert f"--{name}" in result.stdout
    for name in ("device", "qmp", "log", "loop", "trace", "pbkdf-memory-max"):
        assert f"--{name}" in result.stdout


def test_help_and_version_come_before_what_is_wrong_behind_them(tmp_path: Path) -> None:
    assert run("--object", "nope", "--version", "--frobnicate", directory=tmp_path).returncode == 0


#: Wrong options, and what is said about them.
WRONG = [
    (["--frobnicate"], "unrecognized option '--frobnicate'"),
    (["--object"], "option '--object' requires an argument"),
    (["--frob", "--version"], "unrecognized option '--frob'"),
    (["foo"], "foo: Unexpected argument"),
    (
        ["--blockdev", "driver=nope,node-name=n"],
        "--blockdev driver=nope,node-name=n: Parameter 'driver' does not accept value 'nope'",
    ),
    (
        ["--blockdev", "driver=file,node-name=f,filename=missing.img"],
        "--blockdev driver=file,node-name=f,filename=missing.img:"
        " Could not open 'missing.img': No such file or directory",
    ),
    (["--blockdev", "null-co"], "--blockdev null-co: 'node-name' must be specified for the root node"),
    (
        ["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
        "--blockdev null-co,node-name=a: Duplicate nodes with node-name='a'",
    ),
    (
        ["--blockdev", "raw,node-name=r,file=f", "--blockdev", "null-co,node-name=f"],
        "--blockdev raw,node-name=r,file=f: Cannot find device='f' nor node-name='f'",
    ),
    (
        ["--object", "secret,id=a,data=x", "--object", "secret,id=a,data=y"],
        "--object secret,id=a,data=...: attempt to add duplicate property 'a' to object (type 'container')",
    ),
    (["--object", "secret,id=a"], "--object secret,id=a: Either 'file' or 'data' must be provided"),
    (
        ["--object", "secret,id=3,data=x"],
        "--object secret,id=3,data=...: Parameter 'id' expects an identifier",
    ),
    (["--monitor", "m"], '--monitor m: chardev "m" not found'),
    (
        ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
        "--chardev stdio,id=b: cannot use stdio by multiple character devices",
    ),
    (
        ["--qmp", "unix:s,server=on,wait=off", "--monitor", "compat_monitor0"],
        "--monitor compat_monitor0: chardev 'compat_monitor0' is already in use",
    ),
    (
        ["--chardev", "socket,id=a,path=/none/s,server=on,wait=off"],
        "--chardev socket,id=a,path=/none/s,server=on,wait=off:"
        " Failed to bind socket to /none/s: No such file or directory",
    ),
    (
        ["--chardev", "socket,id=a,fd=99,server=on,wait=off"],
        "--chardev socket,id=a,fd=99,server=on,wait=off: File descriptor '99' is not a socket",
    ),
    (
        ["--pidfile", "none/pid"],
        "cannot create PID file: Could not create 'none/pid': No such file or directory",
    ),
    (
        ["--blockdev", '{"driver": "null-co",\n"size": "1"}'],
        """--blockdev {"driver": "null-co", "size": "1"}:"""
        " Invalid parameter type for 'size', expected: integer",
    ),
    (["--log", "loud"], "--log loud: 'loud' is none of error, warning, info, debug"),
    (["--loop", "möbius"], "--loop möbius: 'möbius' is none of auto, uvloop, asyncio"),
    (["--cipher-processes", "-1"], "--cipher-processes -1: '-1' is neither auto nor a number up to 64"),
    (["--cipher-processes", "65"], "--cipher-processes 65: '65' is neither auto nor a number up to 64"),
    (["--pbkdf-memory-max", "1X"], "--pbkdf-memory-max 1X: '1X' is no size such as 512M"),
    (["--pbkdf-memory-max", "-1"], "--pbkdf-memory-max -1: '-1' is no size such as 512M"),
    (["--pbkdf-memory-max="], "--pbkdf-memory-max=: '' is no size such as 512M"),
    (
        ["--pbkdf-memory-max", "32767"],
        "--pbkdf-memory-max 32767: '32767' is less than 32K, with which no key can be derived",
    ),
]

#: The background has no standard input and output: options for them fail there for another reason.
WRONG_IN_THE_BACKGROUND = [(arguments, line) for arguments, line in WRONG if "stdio,id=a" not in arguments]


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded() as preloaded:
        yield preloaded


@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_a_wrong_option_ends_with_status_1_and_one_line(
    arguments: list[str], line: str, tmp_path: Path, preloaded: Preloaded
) -> None:
    result = preloaded.run(*arguments, directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"qmpd: {line}\n")


@pytest.mark.parametrize(("arguments", "line"), WRONG_IN_THE_BACKGROUND)
def test_the_background_makes_no_difference_to_that(
    arguments: list[str], line: str, tmp_path: Path, preloaded: Preloaded
) -> None:
    result = preloaded.run("--daemonize", *arguments, directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"qmpd: {line}\n")


def test_a_failed_start_leaves_no_socket_and_no_pid_file(tmp_path: Path) -> None:
    chardev = "socket,id=m,path=s,server=on,wait=off"
    assert run("--pidfile", "pid", "--chardev", chardev, "--monitor", "x", directory=tmp_path).returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_object_types_are_listed_on_standard_output(tmp_path: Path) -> None:
    result = run("--object", "help", directory=tmp_path)
    assert result.returncode == 0
    assert "  secret\n" in result.stdout
    assert result.stderr == ""


def test_what_the_options_describe_is_there(start_daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "a,b.img").write_bytes(bytes(1 << 20))
    daemon = start_daemon(
        "--object",
        "secret,id=s,data=x",
        "--blockdev",
        "driver=file,node-name=storage,filename=a,,b.img,cache.direct=off",
        "--blockdev",
        '{"driver": "raw", "node-name": "format", "file": "storage", "offset": 512}',
        "--device",
        "virtio-blk-pci,id=disk0,drive=format",
    )
    assert daemon.node_names() == {"storage", "format"}
    assert {entry["name"] for entry in daemon.execute("qom-list", {"path": "/objects"})} >= {"s"}
    (block,) = daemon.execute("query-block")
    assert block["inserted"]["node-name"] == "format"


def test_qmp_is_spoken_on_standard_input_and_output(tmp_path: Path) -> None:
    conversation = '{"execute": "qmp_capabilities"}\n{"execute": "query-version"}\n{"execute": "quit"}\n'
    result = run("--chardev", "stdio,id=m", "--monitor", "chardev=m", directory=tmp_path, text=conversation)
    greeting, *replies = map(json.loads, result.stdout.splitlines())
    assert "QMP" in greeting
    assert [set(reply) for reply in replies] == [{"return"}] * 3
    assert (result.returncode, result.stderr) == (0, "")


def test_a_monitor_may_be_one_option(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*QMPD, "--qmp", "unix:q.sock,server,nowait"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    try:
        wait_for(tmp_path / "q.sock", process)
        with Connection(tmp_path / "q.sock") as connection:
            (chardev,) = connection.execute("query-chardev")
            assert chardev["label"] == "compat_monitor0"
            connection.execute("quit")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a socket accepts connections."""
    for _ in range(int(PATIENCE * 100)):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"qmpd ended with {process.returncode}")
    raise AssertionError(f"nobody listens on {path}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("loop", ["asyncio", "auto"])
def test_a_signal_ends_the_daemon_as_quit_does(
    number: signal.Signals, loop: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--pidfile", "pid", "--loop", loop)
    assert (tmp_path / "pid").read_text() == f"{daemon.process.pid}\n"
    daemon.process.send_signal(number)
    assert daemon.process.wait(PATIENCE) == 0
    assert daemon.stderr.read_text() == ""
    assert not daemon.socket.exists()
    assert not (tmp_path / "pid").exists()


def test_quit_removes_socket_and_pid_file(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon("--pidfile", "pid")
    assert daemon.quit() == 0
    assert not daemon.socket.exists()
    assert not (tmp_path / "pid").exists()


def test_a_start_that_waits_for_a_client_can_be_interrupted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*QMPD, "--pidfile", "pid", "--chardev", "socket,id=m,path=s,server=on", "--monitor", "m"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    try:
        # Seen in the file system, because a connection would be the client that it waits for.
        for _ in range(int(PATIENCE * 100)):
            if (tmp_path / "s").exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()


def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*QMPD, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    process.wait(PATIENCE)


def test_the_schema_of_the_emulator_has_commands_about_a_machine(tmp_path: Path) -> None:
    names = []
    for options in ([], ["--emulator"]):
        result = run("schema", "--introspection", *options, directory=tmp_path)
        entities = json.loads(result.stdout)
        names.append({each["name"] for each in entities if each["meta-type"] in ("command", "event")})
    assert names[0] < names[1]
    assert "query-machines" in names[1] - names[0]
    assert json.loads(run("schema", "--emulator", directory=tmp_path).stdout)


def test_commands_about_a_machine_are_checked_against_the_schema_of_the_emulator(tmp_path: Path) -> None:
    right, wrong = '{"execute": "stop"}', '{"execute": "set-action", "arguments": {"reboot": "panic"}}'
    result = run("check", "--emulator", "-", directory=tmp_path, text=f"{right}\n{wrong}\n")
    assert (result.returncode, result.stdout) == (
        1,
        "-:2: Parameter 'reboot' does not accept value 'panic'\n",
    )
    result = run("check", "-", directory=tmp_path, text=right)
    assert (result.returncode, result.stdout) == (1, "-:1: The command stop has not been found\n")
