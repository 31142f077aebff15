"""Images for the tests of the driver `qcow2`: how they are made, opened and judged."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Final

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission

#: Every option of the format with each of its kinds of values, in combinations that QEMU allows.
OPTIONS: Final = (
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    *(f"cluster_size={size}" for size in (512, 4096, "2M")),
    *(f"cluster_size=1024,refcount_bits={1 << order}" for order in range(7)),
    "lazy_refcounts=on",
    "lazy_refcounts=on,refcount_bits=2,cluster_size=4096",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=2M,refcount_bits=64",
    "compression_type=zstd",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
    "data_file=data.raw,extended_l2=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=metadata,extended_l2=on",
)

#: Those that can have a backing image as well.
WITH_BACKING: Final = tuple(
    option
    for option in OPTIONS
    if not any(part in option for part in ("data_file_raw", "preallocation", "cluster_size=1024"))
)


def run(directory: Path, *command: str) -> str:
    """Run a program; what it says."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
    return done.stdout


def create(directory: Path, options: str, size: int, *, backing: str | None = None) -> Path:
    """An image made by qemu-img, with its data file beside it if there is one."""
    chosen = options.replace("data.raw", str(directory / "data.raw"))
    more = ["-o", chosen] if chosen else []
    if backing is not None:
        more += ["-b", backing, "-F", "raw"]
    run(directory, "qemu-img", "create", "-q", "-f", "qcow2", *more, "d.qcow2", str(size))
    return directory / "d.qcow2"


def create_over(directory: Path, options: str, size: int, base: bytes) -> tuple[Path, bytearray]:
    """An image, and what a guest finds in it: `base` (in a raw backing image), then zeroes."""
    if base:
        (directory / "base.raw").write_bytes(base)
    path = create(directory, options, size, backing="base.raw" if base else None)
    return path, bytearray(base.ljust(size, b"\0"))


async def attach(graph: Graph, path: Path, *, write: bool = True, **options: Any) -> Backend:
    """Open an image, and use it as a guest does."""
    node: Node = await graph.add(
        {
            "driver": "qcow2",
            "node-name": "d",
            "discard": "unmap",
            "read-only": not write,
            "file": {"driver": "file", "filename": str(path)},
            **options,
        }
    )
    perm = Permission.everything() if write else Permission.CONSISTENT_READ
    backend = Backend(graph, perm=perm & ~Permission.WRITE_UNCHANGED)
    backend.attach(node)
    return backend


async def detach(graph: Graph, backend: Backend) -> None:
    """Close it again."""
    backend.detach()
    await graph.delete("d")


def judge(path: Path, model: bytes | bytearray) -> None:
    """qemu-img finds no error and no leak, and what `model` holds."""
    run(path.parent, "qemu-img", "check", str(path))
    raw = path.with_name("model.raw")
    raw.write_bytes(model)
    run(path.parent, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(path))
