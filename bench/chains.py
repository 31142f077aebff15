"""The chains whose data path is measured: one entry of ``CHAINS`` each.

A new format gets its rows by a new entry.  Where a program can't serve a chain
(nbdkit has no filter for it, or a daemon refuses the options) its column stays
empty and the end of the run says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: What stands in the words of a chain for files that only the run knows: the plaintext, and the image.
SOURCE: Final = "{source}"
IMAGE: Final = "{image}"

PASSPHRASE: Final = "abc123"

_SECRET: Final = f"secret,id=passphrase,data={PASSPHRASE}"


@dataclass(frozen=True)
class Chain:
    """A disk format (or several on top of each other), and how to serve it.

    :param name: what `--chain` calls it.
    :param title: the heading of its table.
    :param make: commands that make `IMAGE` of `SOURCE`, every block of it allocated.
    :param blockdev: options of `blockdev-add`, the children inline.
    :param objects: values of `--object` that the options refer to.
    :param nbdkit: nbdkit's words for the same, or None if it has none.
    :param has_aims: whether the aims for throughput are about this chain.
    """

    name: str
    title: str
    make: tuple[tuple[str, ...], ...]
    blockdev: Mapping[str, Any]
    objects: tuple[str, ...] = ()
    nbdkit: tuple[str, ...] | None = None
    has_aims: bool = False


_FILE: Final = {"driver": "file", "filename": IMAGE}

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
        has_aims=True,
    ),
)


def filled(words: Any, **files: str) -> Any:
    """Return *words* (a string, or any nesting of mappings and tuples) with the names of files in place."""
    if isinstance(words, str):
        for name, path in files.items():
            words = words.replace("{" + name + "}", path)
        return words
    if isinstance(words, Mapping):
        return {key: filled(value, **files) for key, value in words.items()}
    return [filled(word, **files) for word in words]
