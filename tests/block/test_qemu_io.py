from __future__ import annotations

import io
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import pytest_asyncio

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.block.qemu_io import QemuIO
from qmpd.errors import Error

MIB = 1 << 20

#: What differs from one run to the next.
TIMES = re.compile(r"[\d.]+ (?:[KMGT]iB|bytes)/sec and [\d.]+ ops/sec|\d+\.\d+ sec|,[\d:.]+,[\d.]+,[\d.]+$")


class Disk:
    """A disk of 1 MiB, and what a line printed."""

    def __init__(self, graph: Graph, path: Path) -> None:
        self.graph = graph
        self.path = path

    async def run(self, line: str, node: str = "disk") -> tuple[str, str]:
        stdout, stderr = io.StringIO(), io.StringIO()
        found = self.graph.find(node)
        assert found is not None
        with Backend(self.graph, perm=Permission.nothing()).use(found) as backend:
            await QemuIO(backend, stdout, stderr).execute(line)
        return stdout.getvalue(), stderr.getvalue()

    async def out(self, line: str) -> str:
        stdout, stderr = await self.run(line)
        assert stderr == ""
        return stdout


@pytest_asyncio.fixture
async def disk(graph: Graph, tmp_path: Path) -> Disk:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    await graph.add({"driver": "file", "node-name": "disk", "filename": str(path), "discard": "unmap"})
    await graph.add({"driver": "null-co", "node-name": "ro", "size": MIB, "read-only": True})
    return Disk(graph, path)


async def test_what_is_written_is_read_and_verified(disk: Disk) -> None:
    assert (await disk.out("write -P 0x11 0 64k")).startswith(
        "wrote 65536/65536 bytes at offset 0\n64 KiB, 1 ops; "
    )
    assert disk.path.read_bytes() == b"\x11" * 65536 + bytes(MIB - 65536)
    assert (await disk.out("read -P 0x11 0 64k")).startswith("read 65536/65536 bytes at offset 0\n")
    wrong = await disk.out("read -P 0x22 0 4k")
    assert wrong.startswith("Pattern verification failed at offset 0, 4096 bytes\nread 4096/4096 bytes")


async def test_a_part_can_be_verified(disk: Disk) -> None:
    await disk.out("write -q -P 1 8 8")
    assert await disk.out("read -q -P 1 -s 8 -l 8 0 32") == ""
    assert (
        await disk.out("read -q -P 1 -s 7 -l 8 0 32") == "Pattern verification failed at offset 7, 8 bytes\n"
    )


async def test_verification_goes_across_pieces(graph: Graph, disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    path.write_bytes(b"\x05" * (3 * MIB) + b"\x06")
    await graph.add({"driver": "file", "node-name": "large", "filename": str(path)})
    assert await disk.run("read -q -P 5 0 3M", "large") == ("", "")
    stdout, _ = await disk.run("read -q -P 5 1M 2097153", "large")
    assert stdout == "Pattern verification failed at offset 1048576, 2097153 bytes\n"
    assert await disk.run("read -q -P 5 -l 2M 1M 2097153", "large") == ("", "")


async def test_the_dump_shows_letters_and_digits_only(disk: Disk) -> None:
    data = bytes(range(0x28, 0x48)) + b"\xe9"
    disk.path.write_bytes(bytes(256) + data + bytes(MIB - 256 - len(data)))
    lines = (await disk.out("read -v 256 33")).splitlines()
    assert lines[:3] == [
        "00000100:  28 29 2a 2b 2c 2d 2e 2f 30 31 32 33 34 35 36 37  ........01234567",
        "00000110:  38 39 3a 3b 3c 3d 3e 3f 40 41 42 43 44 45 46 47  89.......ABCDEFG",
        "00000120:  e9  .",
    ]


async def test_zeroes_discards_and_sizes(disk: Disk) -> None:
    await disk.out("write -q 0 1M")
    assert disk.path.read_bytes() == b"\xcd" * MIB
    assert (await disk.out("write -z 512 1k")).startswith("wrote 1024/1024 bytes at offset 512\n1 KiB, 1 ops")
    assert (await disk.out("discard 4k 4k")).startswith("discard 4096/4096 bytes at offset 4096\n")
    assert disk.path.read_bytes()[512:1536] == bytes(1024)
    assert disk.path.read_bytes()[4096:8192] == bytes(4096)
    assert await disk.out("flush") == ""
    assert await disk.out("length") == "1 MiB\n"
    assert await disk.out("truncate 1536") == ""
    assert await disk.out("l") == "1.500 KiB\n"


@pytest.mark.parametrize("size", [1, 3, 512, MIB - 1, MIB, MIB + 5, 4 * MIB])
async def test_a_file_is_written_over_and_over(disk: Disk, tmp_path: Path, size: int) -> None:
    await disk.out(f"truncate {3 * MIB + 512}")
    pattern = random.Random(size).randbytes(size)
    (tmp_path / "pattern").write_bytes(pattern)
    length = 2 * MIB + 300
    assert await disk.out(f"write -q -s {tmp_path / 'pattern'} 100 {length}") == ""
    data = disk.path.read_bytes()
    assert data[100 : 100 + length] == (pattern * (length // size + 1))[:length]
    assert not any(data[:100])
    assert not any(data[100 + length :])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nope", "No such file or directory"),
        (".", "Is a directory"),
        ("empty", "file is empty"),
        ("fifo", "file is empty"),
        ("a\0b", "Invalid argument"),
    ],
)
async def test_a_file_that_is_no_pattern_is_complained_about(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    descriptors = len(os.listdir("/proc/self/fd"))
    assert await disk.run(f"write -s {name} 0 512") == ("", f"{name}: {complaint}\n")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not any(disk.path.read_bytes())


async def test_a_file_is_closed_after_it_was_written(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "pattern").write_bytes(b"abc")
    descriptors = len(os.listdir("/proc/self/fd"))
    await disk.out(f"write -s {tmp_path / 'pattern'} 0 512")
    await disk.out(f"write -s {tmp_path / 'pattern'} 1M 512")
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_the_machine_readable_report(disk: Disk) -> None:
    assert re.fullmatch(r"512,1,0:00:0\d\.\d\d,[\d.]+,[\d.]+\n", await disk.out("read -C 0 512"))


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("read 1M 1", "read failed: Input/output error\n"),
        ("read 1048575 2", "read failed: Input/output error\n"),
        ("write 1M 1", "write failed: Input/output error\n"),
        ("write -z 1M 1", "write failed: Input/output error\n"),
        ("discard 1M 1", "discard failed: Input/output error\n"),
        ("read 0 2G", "length cannot exceed 2147483136, given 2G\n"),
        ("write 0 2G", "length cannot exceed 2147483136 without -n, given 2G\n"),
        (
            "read x 1",
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x\n",
        ),
        ("read 9223372036854775808 1", "Parsing error: argument too large -- 9223372036854775808\n"),
        ("read -P 256 0 1", "256 is not a valid pattern byte\n"),
        ("read -P 1 -l 33 0 32", "pattern verification range exceeds end of read data\n"),
        ("write -u 0 512", "-u requires -z to be specified\n"),
        ("write -n 0 512", "-n requires -z to be specified\n"),
        ("write -z -P 1 0 512", "Only one of -z, -P, and -s can be specified at the same time\n"),
        ("write -z -s x 0 512", "Only one of -z, -P, and -s can be specified at the same time\n"),
        ("write -s x -P 1 0 512", "Only one of -z, -P, and -s can be specified at the same time\n"),
        ("write -bz 0 512", "-b and -z cannot be specified at the same time\n"),
        ("write -c 8 8", "8 is not a sector-aligned value for 'offset'\n"),
        ("write -s x -b 0 8", "8 is not a sector-aligned value for 'count'\n"),
        ("write -b 0 512", "write failed: Operation not supported\n"),
        ("write -c 0 512", "write failed: Operation not supported\n"),
        ("write -c 1M 512", "write failed: Input/output error\n"),
        ("read -b 0 8", "8 is not a sector-aligned value for 'count'\n"),
        ("read -b 0 512", "read failed: Operation not supported\n"),
        ("help frob", "command frob not found\n"),
    ],
)
async def test_what_a_line_cannot_do_is_printed(disk: Disk, line: str, printed: str) -> None:
    before = disk.path.read_bytes()
    assert await disk.out(line) == printed
    assert disk.path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("frob a", 'command "frob" not found\n'),
        ("read 0", "bad argument count 1 to read, expected at least 2 arguments\n"),
        ("length 1", "bad argument count 1 to length, expected 0 arguments\n"),
        ("truncate", "bad argument count 0 to truncate, expected between 1 and 3 arguments\n"),
        ("read -x 0 1", "read: invalid option -- 'x'\n"),
    ],
)
async def test_what_is_no_line_goes_to_the_other_stream(disk: Disk, line: str, complaint: str) -> None:
    _, stderr = await disk.run(line)
    assert stderr == complaint


@pytest.mark.parametrize("line", ["", "   "])
async def test_an_empty_line_says_nothing(disk: Disk, line: str) -> None:
    assert await disk.run(line) == ("", "")


@pytest.mark.parametrize("line", ["write 0 512", "write x y", "discard 0 512", "truncate 1"])
async def test_a_refused_permission_is_raised_and_nothing_is_kept(disk: Disk, line: str) -> None:
    with pytest.raises(Error, match="^Block node is read-only$"):
        await disk.run(line, "ro")
    assert disk.graph.backends == []


async def test_a_disk_gets_its_own_permissions_back(disk: Disk) -> None:
    node = disk.graph.find("disk")
    assert node is not None
    backend = Backend(disk.graph, perm=Permission.CONSISTENT_READ)
    with backend.use(node):
        await QemuIO(backend, io.StringIO(), io.StringIO()).execute("write -q 0 512")
        assert backend.perm == Permission.CONSISTENT_READ
        await QemuIO(backend, io.StringIO(), io.StringIO()).execute("write -q 1M 512")
        assert backend.perm == Permission.CONSISTENT_READ


async def test_help_has_a_line_for_every_command(disk: Disk) -> None:
    lines = (await disk.out("help")).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("discard", "flush", "help", "length", "read", "readv", "truncate", "write", "writev"),
    ]
    assert await disk.out("? read") == next(line for line in lines if line.startswith("read ")) + "\n"


#: Lines that the program and we must answer alike, one after the other on the same disk.
LINES = (
    """
write -P 7 0 512|write -z 1 3|write -zu 0 512|write -f 0 512|write -c 0 512|write -fb 0 512|write -C 0 512
writev 0 512 512|writev -P 1 0 512 100|readv 0 100 30|readv 0 2G|discard 0 2M|discard x 1|read 0 0|read 1 1
read 0 1G|read -P 1 0 100|read -P 2 0 100|read -v 250 20|read 0x200 512|read 1k 1K|read 0.5k 512|read 1.5 512
read .5k 512|read 1e3 512|read 0 1b|read 0 1s|read 0 1T|read 9223372036854775807 1|read -P 010 0 1
read -P 08 0 1|read -s x -P 1 0 512|read -P 1 -s -1 0 512|read -- 0 512|read 0 512 -q|read -vP0 600 16
write -s three 0 512|write -qs three 5 1000|write -s empty 0 512|write -s nope 0 512|write -s . 0 512
write -P 1 -s three 0 512|write -zs three 0 512|write -s three -n 0 512|write -s nope 0 3G|write -s nope 0 x
write -s|write -s three -s long 7 16|write -s long 0 1M|write -s three 1M 1
write -P 300 -s three 0 1|write -s nope -c 0 8|write -s nope -c 0 512|write -s empty -b 0 512|write -bc 0 512
write -bz 0 512|write -cz 0 512|write -cz 0 8|write -c 8 8|write -c 1M 512|write -fcz 0 512|write -fbz 0 512
read -b 8 512|read -b 0 8|read -b 0 512|write -fs three 0 1k
truncate 2M|length|truncate x|truncate 1M|help a b|flush x|read -P 0x1 -s 90 -l 20 0 110
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


@pytest.mark.peer("qemu-io")
async def test_every_line_is_answered_as_qemu_io_answers_it(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("three", b"abc"), ("empty", b""), ("long", bytes(range(256)) * 8192)):
        (tmp_path / name).write_bytes(data)
    peer = tmp_path / "peer.img"
    peer.write_bytes(bytes(MIB))
    for line in LINES:
        ours = "".join(await disk.run(line))
        command = ["qemu-io", "-f", "raw", "-c", line, str(peer)]
        result = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        theirs = result.stdout + result.stderr
        assert TIMES.sub("#", ours).splitlines() == TIMES.sub("#", theirs).splitlines(), line
    assert disk.path.read_bytes() == peer.read_bytes()
