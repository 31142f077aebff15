"""A conversion of a LUKS header that fails, at whichever write, leaves it as it was or openable."""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

from qmpd.block import luks_conversion
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.crypto import luks
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import formatting
from qmpd.crypto.plan import Write
from qmpd.crypto.steps import run
from qmpd.errors import Error

PASSWORD: Final = b"old"


class Trial:
    """A detached LUKS1 header in a file that can fail."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / "header"
        header, _, plan = run(
            formatting(CipherSpec("aes-128", "xts", "plain64"), "sha256", PASSWORD, 1000, 1000, detached=True)
        )
        disk = bytearray(header.header_length() + 32768)
        for step in plan:
            if isinstance(step, Write):
                disk[step.offset : step.offset + len(step.data)] = step.data
        self.path.write_bytes(disk)
        self.left, self.once, self.names = 1 << 30, True, count()
        path, step_ = str(self.path), self.step

        class FailingFile(FileNode):
            async def _pwrite(self, offset: int, data: memoryview) -> None:
                if self.options["filename"] == path:
                    step_()
                await super()._pwrite(offset, data)

            async def _flush(self) -> None:
                if self.options["filename"] == path:
                    step_()
                await super()._flush()

        def no_secrets(secret_id: str) -> Any:
            raise AssertionError("no passphrase is needed")

        self.graph = Graph({**DRIVERS, "file": FailingFile}, secrets=no_secrets)

    def step(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and not self.once):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def converted(self, version: int) -> bool:
        backup = self.directory / f"backup{next(self.names)}"
        options = {"driver": "file", "filename": str(self.path)}
        before = self.path.read_bytes()
        try:
            await luks_conversion.convert(
                self.graph, options, version, backup=str(backup), commit=lambda: None
            )
        except Error:
            return False
        finally:
            # It was made before anything else, and stays.
            assert luks.parse(backup.read_bytes(), detached=True) == luks.parse(before, detached=True)
        return True

    def opens(self) -> bool:
        data = self.path.read_bytes()
        header = luks.parse(data, detached=True)
        return any(
            run(header.unlocking(slot, PASSWORD, data[offset : offset + length])) is not None
            for slot in header.active_slots
            for offset, length in [header.material_extent(slot)]
        )


@pytest.mark.parametrize("once", [True, False])
async def test_a_write_that_fails_leaves_the_header_as_it_was_or_one_that_opens(
    tmp_path: Path, once: bool
) -> None:
    trial = Trial(tmp_path)
    for version in (2, 1):
        before = trial.path.read_bytes()
        for steps in count():
            trial.path.write_bytes(before)
            trial.left, trial.once = steps, once
            if await trial.converted(version):
                break
            if once:
                assert trial.path.read_bytes() == before
            assert trial.opens()
        assert steps > 8
        assert luks.parse(trial.path.read_bytes(), detached=True).version == version
        assert trial.opens()
    await trial.graph.close()
