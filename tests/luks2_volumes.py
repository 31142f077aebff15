"""LUKS volumes in files, of both versions, that cryptsetup and qmpd take turns with.

Passphrases are files in the volume's directory, and secrets of the graph, under their own names; and every
key derivation costs as little as cryptsetup allows.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto import luks2_binary
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error

PASSPHRASES: Final = ("first", "second", "third")

#: A volume key, as long as the cipher wants it.
KEY: Final = bytes(range(100, 164))

_ARGON2: Final = ("--pbkdf-memory", "32", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4")

#: Options of cryptsetup for the cheapest key derivation.
CHEAP: Final = {
    "pbkdf2": ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
    "argon2i": ("--pbkdf", "argon2i", *_ARGON2),
    "argon2id": ("--pbkdf", "argon2id", *_ARGON2),
}


def _resolve(name: str) -> KeyBuffer:
    if name not in PASSPHRASES:
        raise Error(f"No secret with id '{name}'")
    return KeyMemory().copy_of(name.encode())


@asynccontextmanager
async def new_graph() -> AsyncIterator[Graph]:
    """A graph that has the passphrases."""
    graph = Graph(DRIVERS, secrets=_resolve)
    try:
        yield graph
    finally:
        await graph.close()


class Volume:
    """A volume, with a header in front of its payload or in a file of its own.

    :param directory: gets the files.
    :param size: of the payload's file, in bytes.
    """

    def __init__(self, directory: Path, *, detached: bool = False, size: int = 17 << 20) -> None:
        self.directory = directory
        self.payload = directory / "disk.img"
        self.header = directory / "header.img" if detached else self.payload
        self.detached = detached
        for name in PASSPHRASES:
            (directory / name).write_text(name)
        self.payload.touch()
        os.truncate(self.payload, size)

    # -- cryptsetup

    def tried(self, action: str, *words: str, on: str | None = None) -> subprocess.CompletedProcess[str]:
        """What cryptsetup does with the header.

        :param words: its options, or other arguments.
        :param on: on which file, if not on the header's.
        """
        return subprocess.run(
            ["cryptsetup", action, "--batch-mode", on or self.header.name, *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def cryptsetup(self, action: str, *words: str, on: str | None = None) -> str:
        """The same, where it has to succeed without a complaint."""
        done = self.tried(action, *words, on=on)
        assert (done.returncode, done.stderr) == (0, ""), f"{action} {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def format(
        self, *options: str, kdf: str = "pbkdf2", version: int = 2, key_bits: int | None = None
    ) -> None:
        """Have cryptsetup make it, with the first passphrase.

        :param key_bits: the volume key is the beginning of `KEY`, and so long.
        """
        words = ["--type", f"luks{version}", *CHEAP[kdf], *options, "--key-file", "first"]
        if key_bits is not None:
            (self.directory / "key").write_bytes(KEY[: key_bits // 8])
            words += ["--key-size", str(key_bits), "--volume-key-file", "key"]
        if self.detached:
            self.cryptsetup("luksFormat", "--header", self.header.name, *words, on=self.payload.name)
        else:
            self.cryptsetup("luksFormat", *words)

    def add_key(self, known: str, new: str, *options: str, kdf: str = "pbkdf2") -> None:
        """Have cryptsetup add a passphrase."""
        self.cryptsetup("luksAddKey", *CHEAP[kdf], "--key-file", known, *options, new)

    def opened_by(self) -> dict[str, bool]:
        """Which passphrases cryptsetup can open it with."""
        words = ("--test-passphrase", "--key-file")
        return {name: self.tried("open", *words, name).returncode == 0 for name in PASSPHRASES}

    def metadata(self) -> dict[str, Any]:
        """The metadata, as cryptsetup shows it."""
        shown: dict[str, Any] = json.loads(self.cryptsetup("luksDump", "--dump-json-metadata"))
        return shown

    # -- the header's bytes

    def sequences(self) -> list[int]:
        """The sequence numbers of the two copies."""
        with self.header.open("rb") as file:
            (size,) = struct.unpack_from(">Q", file.read(16), 8)
            file.seek(0)
            data = file.read(2 * size)
        return [
            luks2_binary.parse_copy(data[start : start + size], start).header.sequence for start in (0, size)
        ]

    def rewrite(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the metadata in a way of which cryptsetup knows nothing, in both copies."""
        with self.header.open("r+b") as file:
            size = luks2_binary.claimed_size(file.read(16), 0)
            assert size is not None
            file.seek(0)
            found = luks2_binary.parse_copy(file.read(size), 0)
            metadata = copy.deepcopy(json.loads(found.json))
            change(metadata)
            binary = found.header.next()
            file.seek(0)
            for secondary in (False, True):
                file.write(binary.pack(json.dumps(metadata).encode(), secondary=secondary))

    def overwrite(self, offset: int, data: bytes) -> None:
        """Put bytes into the header's file."""
        with self.header.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    # -- qmpd

    def node_options(self, secret: str = "first", **more: Any) -> dict[str, Any]:
        """BlockdevOptions."""
        options: dict[str, Any] = {"driver": "luks", "key-secret": secret}
        options["file"] = {"driver": "file", "filename": str(self.payload)}
        if self.detached:
            options["header"] = {"driver": "file", "filename": str(self.header)}
        return {**options, **more}

    @asynccontextmanager
    async def open(self, graph: Graph, secret: str = "first", **more: Any) -> AsyncIterator[Node]:
        """Have it open for the time of an ``async with``."""
        node = await graph.add(self.node_options(secret, **{"node-name": "disk", **more}))
        try:
            yield node
        finally:
            await graph.delete(node.name)
