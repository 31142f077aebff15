"""The chains whose data path is measured: one entry of ``CHAINS`` each.

A new format gets its rows by a new entry.  Where a program can't serve a chain
(nbdkit has no filter for it, or a daemon refuses the options) its column stays
empty and the end of the run says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bench.servers import STORAGE_DAEMON
from bench.table import Aim

NBDKIT: Final = "nbdkit"

#: What stands in the words of a chain for what a run knows: plaintext, image, bytes of the disk.
SOURCE: Final = "{source}"
IMAGE: Final = "{image}"
SIZE: Final = "{size}"

PASSPHRASE: Final = "abc123"

_SECRET: Final = f"secret,id=passphrase,data={PASSPHRASE}"


@dataclass(frozen=True)
class Aims:
    """The aims for a chain's throughput, by the kind of load.

    :param copies: the whole disk in order.
    :param large: 256 KiB requests.
    :param alone: 4 KiB requests, one at a time.
    :param queued: the same, 16 at a time.
    :param deep: the same, 64 at a time.
    """

    copies: tuple[Aim, ...] = ()
    large: tuple[Aim, ...] = ()
    alone: tuple[Aim, ...] = ()
    queued: tuple[Aim, ...] = ()
    deep: tuple[Aim, ...] = ()


_ENCRYPTED: Final = Aims(
    copies=(Aim(2, STORAGE_DAEMON), Aim(1, NBDKIT)),
    large=(Aim(2, STORAGE_DAEMON), Aim(1, NBDKIT)),
    alone=(Aim(0.5, STORAGE_DAEMON),),
    queued=(Aim(1, STORAGE_DAEMON),),
    deep=(Aim(1, STORAGE_DAEMON),),
)
_QCOW2: Final = Aims(copies=(Aim(1, STORAGE_DAEMON),), queued=(Aim(0.75, STORAGE_DAEMON),))


@dataclass(frozen=True)
class Chain:
    """A disk format (or several on top of each other), and how to serve it.

    :param name: what `--chain` calls it.
    :param title: the heading of its table.
    :param make: commands that make `IMAGE` of `SOURCE`.
    :param blockdev: options of `blockdev-add`, the children inline.
    :param objects: values of `--object` that the options refer to.
    :param nbdkit: nbdkit's words for the same, or None if it has none.
    :param aims: the aims for its throughput.
    :param fresh: every load gets a new image, because it is about clusters that nobody has written yet.
    """

    name: str
    title: str
    make: tuple[tuple[str, ...], ...]
    blockdev: Mapping[str, Any]
    objects: tuple[str, ...] = ()
    nbdkit: tuple[str, ...] | None = None
    aims: Aims = Aims()
    fresh: bool = False


_FILE: Final = {"driver": "file", "filename": IMAGE}
_QCOW2_NODE: Final = {"driver": "qcow2", "file": _FILE}

#: A second file that an image needs, or is made of.
_BASE: Final = IMAGE + ".base"

CHAINS: Final[tuple[Chain, ...]] = (
    Chain(
        name="raw",
        title="Plain raw",
        make=(("cp", SOURCE, IMAGE),),
        blockdev={"driver": "raw", "file": _FILE},
        nbdkit=("file", IMAGE),
    ),
    Chain(
        name="luks",
        title="LUKS1, aes-256-xts-plain64",
        make=(
            (
                *("qemu-img", "convert", "-f", "raw", "-O", "luks", "--object", _SECRET, "-o"),
                "key-secret=passphrase,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64",
                *(SOURCE, IMAGE),
            ),
        ),
        objects=(_SECRET,),
        blockdev={"driver": "luks", "key-secret": "passphrase", "file": _FILE},
        nbdkit=("--filter=luks", "file", IMAGE, f"passphrase={PASSPHRASE}"),
        aims=_ENCRYPTED,
    ),
    Chain(
        name="qcow2",
        title="qcow2, allocated",
        make=(("qemu-img", "convert", "-f", "raw", "-O", "qcow2", SOURCE, IMAGE),),
        blockdev=_QCOW2_NODE,
        aims=_QCOW2,
    ),
    Chain(
        name="qcow2-unallocated",
        title="qcow2, unallocated",
        make=(("qemu-img", "create", "-q", "-f", "qcow2", IMAGE, SIZE),),
        blockdev=_QCOW2_NODE,
        aims=_QCOW2,
        fresh=True,
    ),
    Chain(
        name="qcow2-backed",
        title="qcow2, unallocated, with an allocated backing image",
        make=(
            ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", SOURCE, _BASE),
            ("qemu-img", "create", "-q", "-f", "qcow2", "-b", _BASE, "-F", "qcow2", IMAGE),
        ),
        blockdev=_QCOW2_NODE,
        aims=_QCOW2,
        fresh=True,
    ),
    Chain(
        name="luks-qcow2",
        title="LUKS1 over qcow2",
        make=(
            (
                *("qemu-img", "convert", "-f", "raw", "-O", "luks", "--object", _SECRET, "-o"),
                "key-secret=passphrase,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64",
                *(SOURCE, _BASE),
            ),
            ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", _BASE, IMAGE),
            ("rm", _BASE),
        ),
        objects=(_SECRET,),
        blockdev={"driver": "luks", "key-secret": "passphrase", "file": _QCOW2_NODE},
        aims=_QCOW2,
    ),
)


def filled(words: Any, **values: str) -> Any:
    """Return *words* (a string, or any nesting of mappings and tuples) with *values* in place."""
    if isinstance(words, str):
        for name, value in values.items():
            words = words.replace("{" + name + "}", value)
        return words
    if isinstance(words, Mapping):
        return {key: filled(value, **values) for key, value in words.items()}
    return [filled(word, **values) for word in words]
