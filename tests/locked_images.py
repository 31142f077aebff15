"""Images for the tests of locks: how they are made, all the ways to open them, and what is locked.

Each kind of image is made once by the peers, and copied for each use.  A *way*
is what a daemon is told to hold an image with; *programs* are the commands that
people run meanwhile.  What a process has locked is read from the kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from daemons import CommandError, RunningDaemon

PASSPHRASE: Final = "abc123"
SECRET: Final = ("--object", f"secret,id=pw,data={PASSPHRASE}")
SIZE: Final = 1 << 20

Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of image.

    :param suffixes: the names of its files, less what they begin with; the one with the data comes first.
    :param options: from a function that gives the options of the driver `file` for a suffix to
        BlockdevOptions without a node name.
    """

    name: str
    suffixes: tuple[str, ...]
    options: Callable[[Callable[[str], Options]], Options]

    def files(self, stem: str) -> list[str]:
        return [f"{stem}.{suffix}" for suffix in self.suffixes]

    def copy(self, masters: Path, directory: Path, stem: str) -> None:
        for suffix in self.suffixes:
            shutil.copyfile(masters / f"{self.name}.{suffix}", directory / f"{stem}.{suffix}")

    def blockdev(self, stem: str, *, file: Mapping[str, Any] | None = None, **options: Any) -> Options:
        """BlockdevOptions for the image whose files begin with `stem`.

        :param file: more options for the files' nodes.
        """
        made = self.options(
            lambda suffix: {"driver": "file", "filename": f"{stem}.{suffix}", **(file or {})},
        )
        return {**made, **{name.replace("_", "-"): value for name, value in options.items()}}

    def words(self, stem: str, *, file: Mapping[str, Any] | None = None) -> str:
        """The same as ``--image-opts`` takes it."""
        return ",".join(f"{name}={value}" for name, value in _flat(self.blockdev(stem, file=file)))


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


KINDS: Final = (
    Kind("raw", ("img",), lambda file: {"driver": "raw", "file": file("img")}),
    Kind("luks", ("img",), lambda file: {"driver": "luks", "key-secret": "pw", "file": file("img")}),
    Kind(
        "luks-detached",
        ("img", "header"),
        lambda file: {"driver": "luks", "key-secret": "pw", "file": file("img"), "header": file("header")},
    ),
    Kind("qcow2", ("img",), lambda file: {"driver": "qcow2", "file": file("img")}),
    Kind(
        "qcow2-luks",
        ("img",),
        lambda file: {
            "driver": "qcow2",
            "file": file("img"),
            "encrypt": {"format": "luks", "key-secret": "pw"},
        },
    ),
)

#: The peers that make them.
MAKERS: Final = ("qemu-img", "cryptsetup")


def make_masters(directory: Path) -> Path:
    """Make one image of each kind, with a key derivation that takes no time."""

    def run(*command: str) -> None:
        subprocess.run(command, cwd=directory, input=PASSPHRASE.encode(), check=True, timeout=60)

    def luks(*arguments: str) -> None:
        run(
            *("cryptsetup", "luksFormat", "--batch-mode", "--type=luks1", "--pbkdf-force-iterations=1000"),
            *("--cipher=aes-xts-plain64", "--key-size=256", "--key-file=-", *arguments),
        )

    for name, size in (
        ("raw.img", SIZE),
        ("luks.img", SIZE * 2),
        ("luks-detached.img", SIZE),
        ("luks-detached.header", SIZE),
    ):
        with (directory / name).open("wb") as file:
            file.truncate(size)
    luks("--align-payload=1", "luks.img")
    luks("--header=luks-detached.header", "luks-detached.img")
    run("qemu-img", "create", "-q", "-f", "qcow2", "qcow2.img", str(SIZE))
    encryption = "encrypt.format=luks,encrypt.key-secret=pw,encrypt.iter-time=1"
    run("qemu-img", "create", "-q", "-f", "qcow2", *SECRET, "-o", encryption, "qcow2-luks.img", str(SIZE))
    return directory


@dataclass(frozen=True)
class Way:
    """How a daemon holds an image.

    :param node: options of the image's node.
    :param file: options of its files' nodes.
    :param export: whether it is exported, and if so, writable or not.
    :param device: the properties of a disk that uses it, besides drive and id; None for no disk.
    """

    node: Mapping[str, Any] = field(default_factory=dict)
    file: Mapping[str, Any] = field(default_factory=dict)
    export: bool | None = None
    device: Mapping[str, Any] | None = None


READ_ONLY: Final = {"read-only": True}
SHARED: Final = {"read-only": True, "force-share": True}
AUTO: Final = {"auto-read-only": True}
UNLOCKED: Final = {"locking": "off"}

WAYS: Final[Mapping[str, Way]] = {
    "read-write": Way(),
    "read-only": Way(READ_ONLY),
    "auto-read-only": Way(AUTO),
    "force-share": Way(SHARED),
    "not locked": Way(file=UNLOCKED),
    "locked": Way(file={"locking": "on"}),
    "exported": Way(export=False),
    "exported writable": Way(export=True),
    "auto-read-only, exported": Way(AUTO, export=False),
    "auto-read-only, exported writable": Way(AUTO, export=True),
    "read-only, exported": Way(READ_ONLY, export=False),
    "read-only, exported writable": Way(READ_ONLY, export=True),
    "force-share, exported": Way(SHARED, export=False),
    "not locked, exported writable": Way(file=UNLOCKED, export=True),
}

#: Those that need a machine.
DEVICE_WAYS: Final[Mapping[str, Way]] = {
    "disk": Way(device={}),
    "shared disk": Way(device={"share-rw": True}),
    "read-only disk": Way(READ_ONLY, device={}),
    "read-only shared disk": Way(READ_ONLY, device={"share-rw": True}),
    "disk not locked": Way(file=UNLOCKED, device={}),
    "force-share disk": Way(SHARED, device={}),
}


@dataclass
class Holder:
    """A daemon that takes and lets go of images.  Its exports need an NBD server, which it starts."""

    daemon: RunningDaemon
    _names: int = 0
    _has_server: bool = False

    def take(self, options: Mapping[str, Any], way: Way) -> tuple[list[str], Callable[[], None]]:
        """Open an image.

        :param options: what :meth:`Kind.blockdev` gave, the way's options included.
        :returns: what was refused, and a function that lets go of all again.
        """
        self._names += 1
        name = f"n{self._names}"
        execute = self.daemon.execute
        refused: list[str] = []
        undo: list[Callable[[], object]] = []

        def attempt(command: str, arguments: Mapping[str, Any], back: Callable[[], object]) -> bool:
            try:
                execute(command, arguments)
            except CommandError as error:
                refused.append(f"{command}: {error.desc.replace(name, 'NODE')}")
                return False
            undo.append(back)
            return True

        def remove_export() -> None:
            execute("block-export-del", {"id": name})
            self.daemon.monitor.wait_event("BLOCK_EXPORT_DELETED", id=name)

        def unplug() -> None:
            execute("device_del", {"id": f"d{name}"})
            # Without a guest QEMU's disks go when the machine is reset.
            with suppress(CommandError):
                execute("system_reset")
            self.daemon.monitor.wait_event("DEVICE_DELETED", device=f"d{name}")

        if way.export is not None and not self._has_server:
            address = {"type": "unix", "data": {"path": f"{self.daemon.socket.stem}-nbd.sock"}}
            execute("nbd-server-start", {"addr": address})
            self._has_server = True
        added = attempt(
            "blockdev-add",
            {**options, "node-name": name},
            lambda: execute("blockdev-del", {"node-name": name}),
        )
        if added and way.export is not None:
            export = {"type": "nbd", "id": name, "node-name": name, "writable": way.export}
            attempt("block-export-add", export, remove_export)
        if added and way.device is not None:
            attempt(
                "device_add",
                {"driver": "virtio-blk-pci", "id": f"d{name}", "drive": name, **way.device},
                unplug,
            )

        def let_go() -> None:
            while undo:
                undo.pop()()

        return refused, let_go


def options_for(kind: Kind, way: Way, stem: str) -> Options:
    """BlockdevOptions of an image held in a way."""
    return {**kind.blockdev(stem, file=way.file), **way.node}


def held_locks(pid: int, directory: Path) -> dict[str, list[str]]:
    """What a process has locked of the files in `directory`: for each name, kinds and bytes of locks.

    The kernel lists the locks of each open file in /proc/PID/fdinfo (proc(5)).  A lock that several
    descriptors hold counts once.
    """
    found: dict[str, set[str]] = {}
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            path = Path(os.readlink(f"/proc/{pid}/fd/{entry.name}"))
            lines = entry.read_text().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            if not line.startswith("lock:") or path.parent != directory:
                continue
            # "lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101"
            _, _, owner, _, mode, *_, first, last = line.split()
            taken = found.setdefault(path.name, set())
            taken.update(f"{owner} {mode} {byte}" for byte in range(int(first), int(last) + 1))
    return {name: sorted(locks) for name, locks in sorted(found.items())}


def run(command: Sequence[str], directory: Path) -> str:
    """Run a program; its exit status and complaints."""
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return f"{done.returncode} {done.stderr.strip()}"
