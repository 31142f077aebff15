"""``qmpd demo``: plug an encrypted disk with a detached header, use it, and take it away again.

In a temporary directory it makes an empty header file and a sparse payload,
starts the daemon on a UNIX socket, and plays over QMP what a management
program would send, with the ``qemu.qmp`` library and with each request and
reply shown.  Data is written and read through the device, and the passphrase
is changed while it is plugged in.  That is done twice, with LUKS1 and, shorter,
with LUKS2 and argon2id.  Then the demo looks at the files from outside, for a
header and for plaintext where neither may be, and lets other programs judge
them.  Everything it shows it also checks: what is not as it should be ends it
with status 1 and one line on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, cast

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

SECRET: Final = "sec0"
PASSPHRASE: Final = "abc123"
NEW_SECRET: Final = "sec1"
NEW_PASSPHRASE: Final = "correct horse"


@dataclass(frozen=True)
class Disk:
    """An encrypted disk of the play.

    :param version: of its LUKS header.
    :param header: the nodes of its header, from the storage up.
    :param payload: the node of its payload.
    :param node: its own.
    :param device: the device's id.
    :param header_file: the name of the file with the header, and `payload_file` of that with the payload.
    :param making: what `blockdev-create` is told besides.
    :param sector_size: the bytes that are encrypted as a unit.
    """

    version: int
    header: tuple[str, ...]
    payload: str
    node: str
    device: str
    header_file: str
    payload_file: str
    making: Mapping[str, Any]
    sector_size: int = 512


#: The nodes are called as libvirt would call them.
LUKS1: Final = Disk(
    version=1,
    header=("libvirt-1-storage", "libvirt-1-format"),
    payload="libvirt-2-storage",
    node="libvirt-3-format",
    device="virtio-disk1",
    header_file="header.img",
    payload_file="payload.raw",
    making={"iter-time": 10},
)

LUKS2: Final = Disk(
    version=2,
    header=("header2",),
    payload="payload2",
    node="disk2",
    device="virtio-disk2",
    header_file="header2.img",
    payload_file="payload2.raw",
    making={
        "version": 2,
        "pbkdf": "argon2id",
        "pbkdf-memory": 16384,
        "iter-time": 50,
        "sector-size": 4096,
        "label": "demo",
    },
    sector_size=4096,
)

#: What is written, where, and how much of it (bytes).
PATTERN: Final = 0xAB
OFFSET: Final = 1 << 20
LENGTH: Final = 64 << 10

LUKS_MAGIC: Final = b"LUKS\xba\xbe"

#: Seconds after which a daemon that does not answer counts as hung.
PATIENCE: Final = 30.0


class DemoError(Exception):
    """Something is not as it should be."""


# --- the command line ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line, as the daemon does."""
        raise DemoError(message)


_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(text: str) -> int:
    """Return a number of bytes from ``1G`` and the like."""
    found = re.fullmatch(r"([0-9]+)([KMGT]?)", text)
    size = int(found[1]) * _UNITS[found[2]] if found else 0
    if size < OFFSET + LENGTH or size % 512:
        raise argparse.ArgumentTypeError(f"'{text}' is no size from 2M up, such as 1G")
    return size


def run(arguments: Sequence[str]) -> int:
    """Run the demo.

    :param arguments: what stands after ``qmpd demo``.
    :return: the exit status.
    """
    parser = _Parser(prog="qmpd demo", description="Plug encrypted disks with detached LUKS headers.")
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    parser.add_argument(
        "--size",
        type=_size,
        default=_size("1G"),
        metavar="SIZE",
        help="of each payload, sparse (default: 1G)",
    )
    try:
        options = parser.parse_args(arguments)
        directory = Path(tempfile.mkdtemp(prefix="qmpd-demo-"))
        screen = Screen(sys.stdout)
        try:
            asyncio.run(Demo(directory, options.size, screen).play())
        finally:
            if options.keep:
                screen.say(f"The files are in {directory}")
            else:
                shutil.rmtree(directory, ignore_errors=True)
    except (DemoError, QMPError, OSError, EOFError, TimeoutError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"qmpd demo: {reason}", file=sys.stderr, flush=True)
        return 1
    return 0


# --- what the person sees --------------------------------------------------------------------------------


class Screen:
    """Text for a person: in colour on a terminal, unless ``NO_COLOR`` is set; plain elsewhere."""

    _STYLES: Final[Mapping[str, str]] = {
        "heading": "1",
        "request": "32",
        "reply": "36",
        "event": "33",
        "good": "1;32",
        "faint": "2",
    }

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, text: str = "", style: str | None = None) -> None:
        """Write a line, or several."""
        if self._colour and style is not None:
            text = f"\x1b[{self._STYLES[style]}m{text}\x1b[0m"
        print(text, file=self._stream, flush=True)

    def heading(self, text: str) -> None:
        """Begin a part."""
        self.say()
        self.say(text, "heading")

    def message(self, arrow: str, message: Mapping[str, Any], style: str) -> None:
        """Show a message of the protocol; a reply is indented if it is very long."""
        text = json.dumps(dict(message))
        if style == "reply" and len(text) > 240:
            text = json.dumps(dict(message), indent=2)
        self.say(f"{arrow} " + text.replace("\n", "\n   "), style)

    def good(self, text: str) -> None:
        """Show what was checked and is as it should be."""
        self.say(f"ok {text}", "good")


def draw_graph(graph: Mapping[str, Any]) -> list[str]:
    """Draw the reply of ``x-debug-query-block-graph`` as text, parents above their children."""
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    children = {edge["child"] for edge in graph["edges"]}
    lines: list[str] = []

    def draw(node: object, indent: str) -> None:
        below = [edge for edge in graph["edges"] if edge["parent"] == node]
        for index, edge in enumerate(below):
            last = index == len(below) - 1
            permissions = ", ".join(edge["perm"]) or "nothing"
            branch = "└── " if last else "├── "
            lines.append(f"{indent}{branch}{edge['name']}: {names[edge['child']]}  ({permissions})")
            draw(edge["child"], indent + ("    " if last else "│   "))

    for node in graph["nodes"]:
        if node["id"] not in children:
            lines.append(node["name"])
            draw(node["id"], "")
    return lines


# --- the play --------------------------------------------------------------------------------------------


@dataclass
class Demo:
    """One performance.

    :param directory: for the files and the socket; empty.
    :param size: of the payload, in bytes.
    :param program: the daemon, to which the monitor's options are added.
    """

    directory: Path
    size: int
    screen: Screen
    program: Sequence[str] = (sys.executable, "-m", "qmpd")
    _client: QMPClient = field(init=False)

    def __post_init__(self) -> None:
        self._stdout = self.directory / "daemon.stdout"

    async def play(self) -> None:
        """Play it from beginning to end.

        :raise DemoError: something is not as it should be.
        """
        self._make_files()
        async with self._daemon() as process:
            await self._make_header()
            await self._plug(LUKS1)
            await self._use(LUKS1)
            await self._show_graph()
            await self._change_passphrase()
            await self._unplug(LUKS1)
            await self._play_luks2()
            await self._quit(process)
        for disk in (LUKS1, LUKS2):
            self._check_files(disk)
        self._ask_others()
        self.screen.say()
        self.screen.say("Everything is as it should be.", "good")

    def _make_files(self) -> None:
        self.screen.heading(f"Empty header files, and a sparse payload of {self.size >> 20} MiB for each")
        for disk in (LUKS1, LUKS2):
            header, payload = self._files(disk)
            header.touch(mode=0o600)
            payload.touch(mode=0o600)
            os.truncate(payload, self.size)
            self.screen.say(f"   {header}")
            self.screen.say(f"   {payload}")

    def _files(self, disk: Disk) -> tuple[Path, Path]:
        return self.directory / disk.header_file, self.directory / disk.payload_file

    @asynccontextmanager
    async def _daemon(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run the daemon with a client connected to it; it is gone afterwards, however this ends."""
        path = self.directory / "qmp.sock"
        socket = f"socket,id=mon,path={str(path).replace(',', ',,')},server=on,wait=off"
        command = [*self.program, "--chardev", socket, "--monitor", "chardev=mon"]
        self.screen.heading("The daemon")
        self.screen.say("   qmpd " + " ".join(command[len(self.program) :]), "request")
        with self._stdout.open("wb") as stdout:
            process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=stdout)
        try:
            self._client = await self._connect(path, process)
            self.screen.message("<-", self._greeting(), "reply")
            try:
                yield process
            finally:
                with suppress(EOFError, OSError, QMPError):  # "quit" has ended the connection before us
                    await self._client.disconnect()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _connect(self, path: Path, process: asyncio.subprocess.Process) -> QMPClient:
        for _ in range(round(PATIENCE * 100)):
            if process.returncode is not None:
                raise DemoError(f"the daemon ended with status {process.returncode} before it listened")
            if path.is_socket():
                client = QMPClient("demo")
                # The socket is there a moment before the daemon listens on it.
                with suppress(ConnectError):
                    await client.connect(str(path))
                    return client
            await asyncio.sleep(0.01)
        raise DemoError(f"the daemon did not listen on {path} within {PATIENCE:g} seconds")

    def _greeting(self) -> dict[str, Any]:
        greeting = self._client.greeting
        if greeting is None:
            raise DemoError("the daemon sent no greeting")
        return greeting._asdict()

    async def _execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, whole: bool = True
    ) -> Any:
        """Send a command, show it and its reply, and return what it returned.

        :param whole: show all of the reply.
        :raise DemoError: it was refused.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        self.screen.message("->", request, "request")
        try:
            returned = await asyncio.wait_for(
                self._client.execute(command, request.get("arguments")), PATIENCE
            )
        except ExecuteError as error:
            raise DemoError(f"{command} was refused: {error}") from error
        if whole:
            self.screen.message("<-", {"return": returned}, "reply")
        return returned

    async def _wait_event(self, listener: EventListener, **data: str) -> None:
        """Show events up to the one with this data."""
        while True:
            event = await asyncio.wait_for(listener.get(), PATIENCE)
            self.screen.message("<-", event, "event")
            told = cast("Mapping[str, Any]", event["data"])
            if all(told.get(key) == value for key, value in data.items()):
                return

    async def _make_header(self) -> None:
        self.screen.heading("The key, and a node for the header: storage, and a format above it")
        await self._execute("object-add", {"qom-type": "secret", "id": SECRET, "data": PASSPHRASE})
        storage, format_ = LUKS1.header
        file, _ = self._files(LUKS1)
        await self._execute("blockdev-add", {"node-name": storage, "driver": "file", "filename": str(file)})
        await self._execute("blockdev-add", {"node-name": format_, "driver": "raw", "file": storage})

        self.screen.heading("A LUKS header is made, as a job (few iterations, so that it takes no time)")
        await self._create(LUKS1)

    async def _create(self, disk: Disk) -> None:
        options = {"driver": "luks", "header": disk.header[-1], "key-secret": SECRET, **disk.making}
        await self._run_job("blockdev-create", {"job-id": "create0", "options": options})

    async def _run_job(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Start a job, and wait for its end.

        :raise DemoError: it failed.
        """
        job_id = arguments["job-id"]
        with self._client.listener("JOB_STATUS_CHANGE") as listener:
            await self._execute(command, arguments)
            await self._wait_event(listener, id=job_id, status="concluded")
        for job in await self._execute("query-jobs"):
            if "error" in job:
                raise DemoError(f"{command} failed: {job['error']}")
        await self._execute("job-dismiss", {"id": job_id})

    async def _plug(self, disk: Disk, *, whole: bool = True) -> None:
        """Open the disk and give it to a device.

        :param whole: show all that `query-block` says, not only what is of LUKS.
        """
        self.screen.heading("The payload, the encrypted disk, and the device")
        _, file = self._files(disk)
        payload = {"node-name": disk.payload, "driver": "file", "filename": str(file)}
        await self._execute("blockdev-add", payload)
        node = {"driver": "luks", "file": disk.payload, "header": disk.header[-1], "key-secret": SECRET}
        await self._execute("blockdev-add", {"node-name": disk.node, **node})
        device = {"driver": "virtio-blk-pci", "num-queues": "1", "scsi": "off"}
        await self._execute("device_add", {**device, "drive": disk.node, "id": disk.device})
        blocks = await self._execute("query-block", whole=whole)
        (image,) = [
            block["inserted"]["image"] for block in blocks if disk.device in block.get("qdev", "")
        ] or [{}]
        if not whole:
            self.screen.message("<- ...", {"format-specific": image.get("format-specific")}, "reply")
        size = self.size - self.size % disk.sector_size
        self._check(image.get("virtual-size") == size, f"the device is a disk of {size} bytes")

    async def _use(self, disk: Disk) -> None:
        self.screen.heading("Data goes through the device (what qemu-io prints goes to the daemon's output)")
        for command, printed in (
            (f"write -P {PATTERN:#x} {OFFSET} {LENGTH}", f"wrote {LENGTH}/{LENGTH} bytes at offset {OFFSET}"),
            ("flush", ""),
            (f"read -P {PATTERN:#x} {OFFSET} {LENGTH}", f"read {LENGTH}/{LENGTH} bytes at offset {OFFSET}"),
        ):
            before = self._stdout.stat().st_size
            target = f"/machine/peripheral/{disk.device}/virtio-backend"
            line = f'qemu-io -d {target} "{command}"'
            reply = await self._execute("human-monitor-command", {"command-line": line})
            with self._stdout.open("rb") as stdout:
                stdout.seek(before)
                output = stdout.read().decode()
            for shown in output.splitlines():
                self.screen.say(f"   {shown}", "faint")
            if reply or "failed" in output or printed not in output:
                raise DemoError(f"qemu-io {command}: {reply or output or 'nothing was printed'}")
        self.screen.good(f"{LENGTH} bytes came back as they were written")

    async def _show_graph(self) -> None:
        self.screen.heading("The graph")
        graph = await self._execute("x-debug-query-block-graph")
        for line in draw_graph(graph):
            self.screen.say(f"   {line}")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        edges = {(names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in graph["edges"]}
        storage, format_ = LUKS1.header
        wanted = {
            (LUKS1.node, "file", LUKS1.payload),
            (LUKS1.node, "header", format_),
            (format_, "file", storage),
        }
        self._check(wanted <= edges, "the disk stands on its payload and on its header")

    async def _change_passphrase(self) -> None:
        self.screen.heading(
            "Another passphrase, while the disk is plugged in: a second one comes, the first one goes"
        )
        await self._rekey(LUKS1, {"iter-time": 10})

    async def _rekey(self, disk: Disk, costs: Mapping[str, Any]) -> None:
        """Put the new passphrase into a keyslot, and take the old one out of its own."""
        await self._execute("object-add", {"qom-type": "secret", "id": NEW_SECRET, "data": NEW_PASSPHRASE})
        added = {"driver": "luks", "state": "active", "new-secret": NEW_SECRET, **costs}
        await self._run_job("blockdev-amend", {"job-id": "add0", "node-name": disk.node, "options": added})
        erased = {"driver": "luks", "state": "inactive", "old-secret": SECRET}
        await self._run_job("blockdev-amend", {"job-id": "erase0", "node-name": disk.node, "options": erased})
        nodes = cast("list[dict[str, Any]]", await self._client.execute("query-named-block-nodes"))
        (node,) = [node for node in nodes if node["node-name"] == disk.node]
        slots = node["image"]["format-specific"]["data"]["slots"]
        self._check(
            # Of LUKS2 only those in use are listed, with their numbers.
            [slot.get("slot", place) for place, slot in enumerate(slots) if slot["active"]] == [1],
            "keyslot 1 is the only one in use",
        )

    async def _unplug(self, disk: Disk) -> None:
        self.screen.heading("And back again")
        with self._client.listener("DEVICE_DELETED") as listener:
            await self._execute("device_del", {"id": disk.device})
            await self._wait_event(listener, device=disk.device)
        for node in (disk.node, disk.payload, *reversed(disk.header)):
            await self._execute("blockdev-del", {"node-name": node})
        for secret in (SECRET, NEW_SECRET):
            await self._execute("object-del", {"id": secret})
        self._check(not await self._execute("query-named-block-nodes"), "no node is left")

    async def _play_luks2(self) -> None:
        self.screen.heading(
            "A second disk: LUKS2 with argon2id and sectors of 4096 bytes, its header detached as well"
        )
        await self._execute("object-add", {"qom-type": "secret", "id": SECRET, "data": PASSPHRASE})
        (node,), (file, _) = LUKS2.header, self._files(LUKS2)
        await self._execute("blockdev-add", {"node-name": node, "driver": "file", "filename": str(file)})
        await self._create(LUKS2)
        await self._plug(LUKS2, whole=False)
        await self._use(LUKS2)
        self.screen.heading("Another passphrase, in the same way")
        await self._rekey(LUKS2, {"pbkdf-memory": 16384, "iter-time": 50})
        await self._unplug(LUKS2)

    async def _quit(self, process: asyncio.subprocess.Process) -> None:
        await self._execute("quit")
        status = await asyncio.wait_for(process.wait(), PATIENCE)
        self._check(status == 0, "the daemon ended with status 0")
        self._check(not (self.directory / "qmp.sock").exists(), "its socket is gone")

    # --- the files, from outside

    def _check_files(self, disk: Disk) -> None:
        self.screen.heading(f"The files of the LUKS{disk.version} disk, seen from outside")
        header_file, payload_file = self._files(disk)
        header = header_file.read_bytes()
        self._check(
            header.startswith(LUKS_MAGIC)
            and header[len(LUKS_MAGIC) :][:2] == disk.version.to_bytes(2, "big"),
            f"the header file begins with a LUKS{disk.version} header",
        )
        plaintext = bytes([PATTERN]) * 16
        held = 0
        with payload_file.open("rb") as payload:
            for start, length in _pieces(payload.fileno(), self.size):
                held += length
                # With some bytes more, so that nothing hides at a border.
                data = os.pread(payload.fileno(), length + len(plaintext), start)
                if LUKS_MAGIC in data:
                    raise DemoError(f"the payload holds a LUKS header after byte {start}")
                if plaintext in data:
                    raise DemoError(f"the payload holds plaintext after byte {start}")
            written = os.pread(payload.fileno(), LENGTH, OFFSET)
        self._check(os.stat(payload_file).st_size == self.size, "the payload has the size that it had")
        self._check(
            len(set(written)) == 256,
            f"bytes {OFFSET} to {OFFSET + LENGTH} of the payload look like noise",
        )
        self.screen.good(f"the payload holds {held} bytes, with no header and no plaintext in them")

    def _ask_others(self) -> None:
        """Open header and payload with other programs, those that are there."""
        self.screen.heading("Other programs")
        key = self.directory / "passphrase"
        key.touch(mode=0o600)
        key.write_text(NEW_PASSPHRASE)
        (header, payload), (header2, payload2) = (self._files(disk) for disk in (LUKS1, LUKS2))
        image = f"driver=luks,key-secret=key,file.driver=file,file.filename={payload}"
        image += f",header.driver=file,header.filename={header}"
        secret = f"secret,id=key,file={key}"
        read = f"read -P {PATTERN:#x} {OFFSET} {LENGTH}"
        unlock = ["cryptsetup", "open", "--test-passphrase", "--key-file", str(key), "--type"]
        self._ask(["cryptsetup", "luksDump", str(header)])
        self._ask([*unlock, "luks1", "--header", str(header), str(payload)])
        self._ask(["qemu-img", "info", "--object", secret, "--image-opts", image], oldest="9.0")
        self._ask(["qemu-io", "--object", secret, "--image-opts", image, "-c", read], oldest="9.0")

        self.screen.heading("Other programs, about the LUKS2 disk (QEMU's know nothing of LUKS2)")
        made = ("Version: 2", "Label: demo", "sector: 4096 [bytes]", "1: luks2", "PBKDF: argon2id")
        self._ask(["cryptsetup", "luksDump", str(header2)], saying=made)
        self._ask([*unlock, "luks2", "--header", str(header2), str(payload2)])

    def _ask(self, command: Sequence[str], *, oldest: str = "", saying: Sequence[str] = ()) -> None:
        """Run another program, unless it is missing or older than it may be.

        :param saying: lines that it has to print, with single blanks; they are shown.
        """
        program = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if program is None:
            self.screen.say(f"-- {command[0]} is not installed: not asked", "faint")
            return
        if oldest and _version(program) < _numbers(oldest):
            self.screen.say(f"-- {command[0]} is older than {oldest}: not asked", "faint")
            return
        result = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        output = result.stdout + result.stderr
        if result.returncode or "Pattern verification failed" in output:
            raise DemoError(f"{command[0]} {command[1]}: {output}")
        said = [" ".join(line.split()) for line in output.splitlines()]
        for line in saying:
            if line not in said:
                raise DemoError(f"{command[0]} {command[1]} does not say '{line}': {output}")
            self.screen.say(f"   {line}", "faint")
        self.screen.good(" ".join(command[:2]).replace(" --object", ""))

    def _check(self, holds: bool, promise: str) -> None:
        if not holds:
            raise DemoError(f"not as it should be: {promise}")
        self.screen.good(promise)


def _pieces(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a sparse file that were written, as (start, length) in bytes, none above 1 MiB."""
    position = 0
    while position < size:
        try:
            position = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(descriptor, position, os.SEEK_HOLE)
        while position < end:
            length = min(1 << 20, end - position)
            yield position, length
            position += length


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", text))


def _version(program: str) -> tuple[int, ...]:
    """Return the version that a QEMU program prints."""
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version ([0-9.]+)", output)
    return _numbers(found[1]) if found else ()
