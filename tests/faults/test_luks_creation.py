"""A creation that stops half-way leaves no image that looks whole."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.drivers.luks import create
from qmpd.block.graph import Graph
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error


class Failing:
    """Lets some writes and flushes pass, then fails every one."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def step(self) -> None:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1


def failing_graph(failing: Failing) -> Graph:
    class FailingFile(FileNode):
        async def _pwrite(self, offset: int, data: memoryview) -> None:
            failing.step()
            await super()._pwrite(offset, data)

        async def _flush(self) -> None:
            failing.step()
            await super()._flush()

    return Graph({**DRIVERS, "file": FailingFile}, secrets=lambda _: KeyMemory().copy_of(b"pw"))


def options(path: Path) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "luks", "file": file, "size": 4096, "key-secret": "pw", "iter-time": 1}


async def count_steps(path: Path) -> int:
    failing = Failing(1000)
    graph = failing_graph(failing)
    await create(graph, options(path))
    await graph.close()
    return 1000 - failing.left


async def test_wherever_a_creation_stops_the_image_is_whole_or_none(tmp_path: Path) -> None:
    (tmp_path / "whole").touch()
    steps = await count_steps(tmp_path / "whole")
    assert steps >= 3
    outcomes = []
    for allowed in range(steps):
        path = tmp_path / f"stopped-{allowed}"
        path.touch()
        graph = failing_graph(Failing(allowed))
        with pytest.raises((OSError, Error)):
            await create(graph, options(path))
        assert graph._nodes == {}
        file = {"driver": "file", "filename": str(path)}
        opening = graph.add({"driver": "luks", "node-name": "l", "file": file, "key-secret": "pw"})
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        if isinstance(result, Error):
            assert result.desc == "Volume is not in LUKS format"
        outcomes.append("none" if isinstance(result, Error) else "whole")
        await graph.close()
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == "none"
