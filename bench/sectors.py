"""LUKS2 payloads in sectors of 4096 bytes beside those of 512.

Both are qmpd: the cipher alone, on one processor, and a whole disk by nbdcopy.
Every figure of one is taken right after that of the other, and who is first
changes from round to round.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench.chains import PASSPHRASE, Chain
from bench.ciphers import seconds_for_one
from bench.data_path import settle, write_source
from bench.luks2_volumes import write_volume
from bench.nbd_clients import nbdcopy
from bench.nbd_servers import NbdServer
from bench.servers import qmpd
from bench.table import Aim, Row, Samples
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.sectors import SectorCipher

#: What the table calls the two.
SMALL: Final = "512 bytes"
LARGE: Final = "4096 bytes"
SECTOR_SIZES: Final = {SMALL: 512, LARGE: 4096}

_AIMS: Final = (Aim(1, SMALL),)
_SPECS: Final = (CipherSpec("aes-256", "xts", "plain64"), CipherSpec("aes-256", "cbc", "essiv", "sha256"))
_KIB: Final = 1 << 10

#: What opens without taking long.
_COSTS: Final = Kdf("pbkdf2", bytes(32), 1000)


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often everything is measured.
    :param seconds: how long one figure of the cipher takes.
    :param size: bytes of the disk, a multiple of 1 MiB.
    """

    rounds: int = 5
    seconds: float = 0.5
    size: int = 512 << 20


QUICK: Final = Settings(rounds=1, seconds=0.02, size=16 << 20)


def run(settings: Settings) -> Samples:
    """Measure the two in turn."""
    samples = Samples()
    with ExitStack() as stack:
        ciphers = list(_cipher_rows(settings.seconds))
        copies = list(_copy_rows(stack, settings.size)) if shutil.which("nbdcopy") else []
        for number in range(settings.rounds):
            samples.next_round()
            for row, measures in (*ciphers, *copies):
                in_turn = list(measures.items())
                for name, measure in in_turn[:: -1 if number % 2 else 1]:
                    samples.add(row, name, measure())
    return samples


Rows = Iterator[tuple[Row, dict[str, Callable[[], float]]]]


def _cipher_rows(seconds: float) -> Rows:
    """The cipher alone: MB/s for requests of one size."""
    for spec in _SPECS:
        key = os.urandom(spec.key_bytes)
        ciphers = {name: SectorCipher(spec, key, size) for name, size in SECTOR_SIZES.items()}
        for length in (4 * _KIB, 256 * _KIB):
            data, into = os.urandom(length), bytearray(length)
            for doing in ("decrypt", "encrypt"):

                def rate(cipher: SectorCipher, doing: str, data: bytes, into: bytearray) -> float:
                    call = cipher.decrypt_into if doing == "decrypt" else cipher.encrypt_into
                    return len(data) / seconds_for_one(partial(call, data, 0, into), seconds) / 1e6

                title = f"{doing} {length // _KIB} KiB, {spec.algorithm}-{spec.header_names()[1]}"
                measures: dict[str, Callable[[], float]] = {
                    name: partial(rate, cipher, doing, data, into) for name, cipher in ciphers.items()
                }
                yield Row(title, "MB/s", _AIMS), measures


def _copy_rows(stack: ExitStack, size: int) -> Rows:
    """A whole disk, over NBD: MB/s.  The servers run until the end."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    source = directory / "source.raw"
    write_source(source, size)
    servers = {}
    for name, sector_size in SECTOR_SIZES.items():
        image = directory / f"{sector_size}.luks"
        write_volume(image, PASSPHRASE.encode(), _COSTS, size, sector_size)
        own = directory / str(sector_size)
        own.mkdir()
        chain = Chain(
            name=f"luks2-{sector_size}",
            title=name,
            make=(),
            objects=(f"secret,id=s,data={PASSPHRASE}",),
            blockdev={
                "driver": "luks",
                "key-secret": "s",
                "file": {"driver": "file", "filename": str(image)},
            },
        )
        servers[name] = server = NbdServer(qmpd(), chain, image, own)
        stack.callback(server.stop)
        server.start()
        nbdcopy(server.uri, source)
        settle(image)

    def rate(server: NbdServer, from_file: Path | None) -> float:
        server.start()
        measured = size / nbdcopy(server.uri, from_file) / 1e6
        if from_file is not None:
            settle(server.image)
        return measured

    for direction, from_file in (("read", None), ("write", source)):
        yield (
            Row(f"nbdcopy, {direction} whole disk, aes-256-xts-plain64", "MB/s", _AIMS),
            {name: partial(rate, server, from_file) for name, server in servers.items()},
        )
