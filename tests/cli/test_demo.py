"""``qmpd demo``: it works here, it shows what it does, and it fails when something is wrong."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
from daemons import CHECKOUT, QMPD

from qmpd.cli.demo import Demo, DemoError, Screen, draw_graph, run


def demo(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*QMPD, "demo", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_demo_plays_the_whole_sequence_and_leaves_nothing(tmp_path: Path) -> None:
    result = demo(directory=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    shown = [
        '-> {"execute": "object-add"',
        '-> {"execute": "blockdev-create"',
        '"num-queues": "1", "scsi": "off"',
        '-> {"execute": "query-block"}',
        "wrote 65536/65536 bytes at offset 1048576",
        "read 65536/65536 bytes at offset 1048576",
        "── header: libvirt-1-format",
        '-> {"execute": "device_del"',
        '"event": "DEVICE_DELETED"',
        '"version": 2, "pbkdf": "argon2id"',
        '"sector-size": 4096',
        '-> {"execute": "device_del"',
        '-> {"execute": "quit"}',
        "ok the header file begins with a LUKS1 header",
        "no header and no plaintext",
        "ok the header file begins with a LUKS2 header",
        "no header and no plaintext",
        "Everything is as it should be.",
    ]
    position = 0
    for text in shown:
        position = result.stdout.index(text, position) + len(text)
    assert "\x1b" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_demo_keeps_its_files_when_asked(tmp_path: Path) -> None:
    result = demo("--keep", "--size", "4M", directory=tmp_path)
    assert result.returncode == 0
    (directory,) = tmp_path.iterdir()
    assert (directory / "payload.raw").stat().st_size == 4 << 20
    assert (directory / "header.img").read_bytes().startswith(b"LUKS\xba\xbe")
    assert str(directory) in result.stdout


@pytest.mark.peer("cryptsetup")
def test_cryptsetup_is_shown_the_luks2_disk_and_says_what_it_is(tmp_path: Path) -> None:
    result = demo("--keep", "--size", "4M", directory=tmp_path)
    judged = result.stdout.partition("about the LUKS2 disk")[2]
    assert "   PBKDF: argon2id\nok cryptsetup luksDump\nok cryptsetup open\n" in judged
    (directory,) = tmp_path.iterdir()
    header = directory / "header2.img"
    dump = subprocess.run(["cryptsetup", "luksDump", str(header)], capture_output=True, text=True, check=True)
    assert "0: luks2" not in dump.stdout
    assert "argon2id" in dump.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--size", "0"], "qmpd demo: argument --size: '0' is no size from 2M up, such as 1G"),
        (["--size", "1X"], "qmpd demo: argument --size: '1X' is no size from 2M up, such as 1G"),
        (["--frobnicate"], "qmpd demo: unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_argument_ends_with_status_1_and_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (["false"], "the daemon ended with status 1 before it listened"),
        (["true"], "the daemon ended with status 0 before it listened"),
    ],
)
async def test_a_daemon_that_does_not_start_fails_the_demo(
    program: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DemoError) as failure:
        await Demo(tmp_path, 4 << 20, Screen(io.StringIO()), program).play()
    assert str(failure.value) == message


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colour_and_a_pipe_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        Screen(stream).good("x")
    assert terminal.getvalue() == "\x1b[1;32mok x\x1b[0m\n"
    assert pipe.getvalue() == "ok x\n"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    Screen(terminal).good("x")
    assert terminal.getvalue() == "ok x\n"


def test_a_graph_is_drawn_from_its_roots_down() -> None:
    graph = {
        "nodes": [
            {"id": 1, "name": "storage", "type": "block-driver"},
            {"id": 2, "name": "disk", "type": "block-driver"},
            {"id": 3, "name": "header", "type": "block-driver"},
            {"id": 4, "name": "device", "type": "block-backend"},
            {"id": 5, "name": "alone", "type": "block-driver"},
        ],
        "edges": [
            {
                "parent": 4,
                "child": 2,
                "name": "root",
                "perm": ["consistent-read", "write"],
                "shared-perm": [],
            },
            {"parent": 2, "child": 1, "name": "file", "perm": ["write"], "shared-perm": []},
            {"parent": 2, "child": 3, "name": "header", "perm": [], "shared-perm": []},
        ],
    }
    assert draw_graph(graph) == [
        "device",
        "└── root: disk  (consistent-read, write)",
        "    ├── file: storage  (write)",
        "    └── header: header  (nothing)",
        "alone",
    ]
