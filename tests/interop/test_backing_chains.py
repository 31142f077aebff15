"""Chains of images that QEMU made hold the same here: every byte, and how deep each one lies."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.crypto.memory import KeyMemory

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 2 << 20
UNIT = 4096


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_at_random(path: Path, image_format: str, source: random.Random) -> None:
    """A dozen writes, zero writes and discards."""
    commands: list[str] = []
    for _ in range(12):
        length = source.randrange(1, 24) * UNIT
        offset = source.randrange((SIZE - length) // UNIT) * UNIT
        verb = source.choice([f"write -P {source.randrange(1, 256)}", "write", "write -z", "discard"])
        commands += ["-c", f"{verb} {offset} {length}"]
    run("qemu-io", "-f", image_format, *commands, str(path))


@pytest.mark.parametrize("seed", range(4))
async def test_a_chain_reads_as_qemu_reads_it(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    run("qemu-img", "create", "-q", "-f", "raw", str(tmp_path / "0.raw"), str(SIZE - source.choice([0, 512])))
    below, below_format = "0.raw", "raw"
    write_at_random(tmp_path / "0.raw", "raw", random.Random(seed))
    for number in range(1, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "image.qcow2"
        options = f"cluster_size={1 << source.randrange(12, 18)},compat={source.choice(['0.10', '1.1'])}"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-u",
            "-b", f"../{below}", "-F", below_format, str(path), str(SIZE))  # fmt: skip
        write_at_random(path, "qcow2", source)
        below, below_format = f"{number}/image.qcow2", "qcow2"
    top = tmp_path / below
    run("qemu-img", "convert", "-O", "raw", str(top), str(tmp_path / "flat"))
    mapped = json.loads(run("qemu-img", "map", "--output=json", str(top)))

    graph = Graph(DRIVERS, secrets=lambda secret_id: KeyMemory().take(0))
    node = await graph.add(
        {
            "driver": "qcow2",
            "node-name": "top",
            "read-only": True,
            "file": {"driver": "file", "filename": str(top)},
        }
    )
    try:
        assert node.backing_depth == 4
        assert bytes(await node.pread(0, SIZE)) == (tmp_path / "flat").read_bytes()
        for run_of_bytes in mapped:
            offset, end = run_of_bytes["start"], run_of_bytes["start"] + run_of_bytes["length"]
            while offset < end:
                status = await node.block_status(offset, end - offset)
                if run_of_bytes["present"]:
                    assert status.depth == run_of_bytes["depth"] + 1, offset
                assert status.zero == run_of_bytes["zero"], offset
                offset += status.length
    finally:
        await graph.close()
