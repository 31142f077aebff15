"""Making new images: what a `blockdev-create` job does.

All that can fail without touching the disk (options, secrets, the key
derivation) comes first; then the sizes are set and the header is written.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from qmpd.block import allocation
from qmpd.block.backend import Backend
from qmpd.block.drivers.file import resize
from qmpd.block.file_locks import ImageLocks
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.crypto import luks1
from qmpd.crypto.ciphers import CipherSpec
from qmpd.errors import Error

#: What whoever makes an image takes on its nodes.
_CREATE = Permission.WRITE | Permission.RESIZE

#: Milliseconds for one passphrase check, if `iter-time` is not given.
DEFAULT_ITER_TIME = 2000

#: The largest image, in bytes: a file's size is signed.
_MAX_SIZE = (1 << 63) - 512


async def create(graph: Graph, options: Mapping[str, Any]) -> None:
    """Make an image.

    :param options: BlockdevCreateOptions, validated, in QAPI's names.
    :raise Error: what went wrong.
    """
    await CREATORS[options["driver"]](graph, options)


async def _create_file(graph: Graph, options: Mapping[str, Any]) -> None:
    await graph.in_io_thread(_create_regular_file, options)


def _create_regular_file(options: Mapping[str, Any]) -> None:
    filename, size = options["filename"], options["size"]
    preallocation = options.get("preallocation", "off")
    if preallocation not in ("off", "falloc", "full"):
        raise Error(f"Unsupported preallocation mode: {preallocation}")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(filename, flags, 0o644)
    except OSError as error:
        raise Error(f"Could not create '{filename}': {error.strerror}") from None
    try:
        locks = ImageLocks(descriptor)
        locks.prepare(_CREATE, Permission.everything() & ~Permission.RESIZE)
        resize(descriptor, 0, "off")
        if options.get("nocow"):
            allocation.ask_no_copy_on_write(descriptor)
        if options.get("extent-size-hint"):
            allocation.hint_extent_size(descriptor, options["extent-size-hint"])
        resize(descriptor, size, preallocation)
    finally:
        os.close(descriptor)


async def _create_luks(graph: Graph, options: Mapping[str, Any]) -> None:
    size: int | None = options.get("size")
    preallocation: str = options.get("preallocation", "off")
    async with AsyncExitStack() as stack:
        if "file" not in options and "header" not in options:
            raise Error("Either the parameter 'header' or 'file' must be specified")
        payload = header_disk = None
        if "file" in options:
            payload = await stack.enter_async_context(_for_creation(graph, options["file"]))
        if "header" in options:
            header_disk = await stack.enter_async_context(_for_creation(graph, options["header"]))

        spec = CipherSpec.from_options(
            options.get("cipher-alg"),
            options.get("cipher-mode"),
            options.get("ivgen-alg"),
            options.get("ivgen-hash-alg"),
        )
        if "key-secret" not in options:
            raise Error("Parameter 'key-secret' is required for cipher")
        if size is not None and size > _MAX_SIZE:
            raise Error("The requested file size is too large")
        hash_name = options.get("hash-alg", "sha256")
        iter_time = options.get("iter-time", DEFAULT_ITER_TIME)

        def derive() -> tuple[luks1.Header, list[luks1.Write | luks1.Barrier]]:
            iterations = luks1.iterations_for(hash_name, spec.key_bytes, iter_time)
            detached = header_disk is not None
            header, key, plan = luks1.format_plan(spec, hash_name, password, *iterations, detached=detached)
            key.wipe()
            return header, plan

        password = graph.secrets(options["key-secret"])
        try:
            header, plan = await graph.in_key_thread(derive)
        finally:
            password[:] = bytes(len(password))
        target = header_disk or payload
        assert target is not None
        if payload is not None and size is not None:
            offset = header.payload_offset * luks1.SECTOR
            await payload.truncate(offset + size, preallocation)
        if header_disk is not None:
            await header_disk.truncate(header.header_length())
        for step in plan:
            if isinstance(step, luks1.Write):
                await target.pwrite(step.offset, step.data)
            else:
                await target.flush()


@asynccontextmanager
async def _for_creation(graph: Graph, reference: str | Mapping[str, Any]) -> AsyncIterator[Backend]:
    """A node that is written as a whole for the time of an ``async with``."""
    async with graph.borrow(reference) as node:
        with Backend(graph, perm=_CREATE).use(node) as backend:
            yield backend


#: The drivers that can make an image.
CREATORS: Final[Mapping[str, Callable[[Graph, Mapping[str, Any]], Awaitable[None]]]] = {
    "file": _create_file,
    "luks": _create_luks,
}
