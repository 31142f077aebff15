"""LUKS1 volumes for tests of their keyslots: filled with passphrases, and judged by which ones open them.

Those of LUKS2, by the same functions, are in `luks2_areas.py`.

A volume here is its bytes up to the end of the key area.  The volume key is the shortest that there is, so
that a keyslot takes 64,000 bytes and little time; the number of iterations is the least as well.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from qmpd.crypto import luks1
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks import Luks1, LuksHeader
from qmpd.crypto.luks1 import SECTOR, Header
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES, activating, erase_plan
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.steps import run

ITERATIONS: Final = 1000

#: BlockdevCreateOptionsLUKS's members for such a volume.
CIPHER: Final = {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain64"}

SPEC: Final = CipherSpec.from_options("aes-128", "cbc", "plain64")

#: Which passphrase is in which slot.
Passwords = Mapping[int, bytes]


def carried_out(area: bytes, plan: Plan) -> bytes:
    """The volume after all of a plan."""
    image = bytearray(area)
    for step in plan:
        if isinstance(step, Write):
            image[step.offset : step.offset + len(step.data)] = step.data
    return bytes(image)


def new_area(*, detached: bool) -> bytes:
    """A volume that `base` in slot 0 opens."""
    header, key, plan = run(
        luks1.formatting(SPEC, "sha256", b"base", ITERATIONS, ITERATIONS, detached=detached)
    )
    key.wipe()
    return carried_out(bytes(header.header_length()), plan)


def parse(area: bytes, *, detached: bool) -> Header:
    return Header.parse(area, detached=detached)


def read(area: bytes, *, detached: bool) -> LuksHeader:
    """The header in the shape that both versions have."""
    return Luks1(parse(area, detached=detached), area[:HEADER_SECTORS_BYTES])


def filled(area: bytes, passwords: Passwords, *, detached: bool) -> bytes:
    """The same volume with these passphrases and no other; `base` is in its slot 0."""
    header = parse(area, detached=detached)
    found = run(luks1.unlocking(header, 0, b"base", area[slice(*extent(header, 0))]))
    assert found is not None
    with found as key:
        for slot, password in sorted(passwords.items(), reverse=True):
            header, plan = run(
                activating(header, area[:HEADER_SECTORS_BYTES], [slot], key.data, password, ITERATIONS)
            )
            area = carried_out(area, plan)
    if 0 not in passwords:
        header, plan = erase_plan(header, area[:HEADER_SECTORS_BYTES], [0])
        area = carried_out(area, plan)
    assert header.active_slots == sorted(passwords)
    return area


def activation(
    area: bytes, slots: list[int], known: bytes, password: bytes, *, detached: bool
) -> tuple[Header, Plan]:
    """The plan that puts `password` into slots of a volume that `known` opens."""
    header = parse(area, detached=detached)
    for slot in header.active_slots:
        found = run(luks1.unlocking(header, slot, known, area[slice(*extent(header, slot))]))
        if found is not None:
            with found as key:
                sectors = area[:HEADER_SECTORS_BYTES]
                return run(activating(header, sectors, slots, key.data, password, ITERATIONS))
    raise AssertionError(f"{known!r} opens nothing")


def erasure(area: bytes, slots: list[int], *, detached: bool) -> Plan:
    """The plan that takes the keys out of slots."""
    return read(area, detached=detached).erasing(slots)[1]


def extent(header: Header | LuksHeader, slot: int) -> tuple[int, int]:
    """Where the key material of a slot begins and ends."""
    offset, length = header.material_extent(slot)
    return offset, offset + length


class Judge:
    """Says which passphrases open a volume; remembers each slot that it has tried."""

    def __init__(self, *, detached: bool) -> None:
        self.detached = detached
        self._known: dict[tuple[Kdf, bytes, bytes], bool] = {}

    def header(self, area: bytes) -> LuksHeader:
        return read(area, detached=self.detached)

    def opens(self, area: bytes, password: bytes, slot: int | None = None) -> bool:
        """Whether a passphrase opens the volume, by this slot or by any."""
        header = self.header(area)
        slots = header.active_slots if slot is None else [slot]
        return any(self._try(header, number, area, password) for number in slots)

    def opened(self, area: bytes, passwords: Iterable[bytes]) -> dict[int, bytes]:
        """Which of these passphrases opens which slot; those that probably do come first."""
        candidates = list(dict.fromkeys(passwords))
        header = self.header(area)
        found = {}
        for slot in header.active_slots:
            match = next((one for one in candidates if self._try(header, slot, area, one)), None)
            if match is not None:
                found[slot] = match
        return found

    def _try(self, header: LuksHeader, slot: int, area: bytes, password: bytes) -> bool:
        if slot not in header.active_slots:
            return False
        material = area[slice(*extent(header, slot))]
        what = (header.derivation(slot), material, password)
        if what not in self._known:
            self._known[what] = run(header.unlocking(slot, password, material)) is not None
        return self._known[what]


def sectors_in_common(left: bytes, right: bytes) -> int:
    """How many sectors of `left` are somewhere in `right`, zeroes left out."""
    found = {right[at : at + SECTOR] for at in range(0, len(right), SECTOR)} - {bytes(SECTOR)}
    return sum(left[at : at + SECTOR] in found for at in range(0, len(left), SECTOR))


# -- other people's programs


def accepted_by_cryptsetup(header: Path) -> None:
    """`cryptsetup luksDump` reads it without complaint."""
    done = subprocess.run(["cryptsetup", "luksDump", header], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def opens_by_cryptsetup(header: Path, password: bytes, *more: str) -> bool:
    """Whether `cryptsetup open --test-passphrase` takes the passphrase.

    :param more: options.
    """
    done = subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--type", "luks", "--key-file", "-", *more, header],
        input=password,
        capture_output=True,
        check=False,
    )
    # Where no slot is in use it does not even try.
    assert done.returncode in (0, 2) or b"No usable keyslot" in done.stderr, done.stderr
    return done.returncode == 0


def opens_by_qemu_io(image_options: str, password: bytes) -> bool:
    """Whether qemu-io opens the image with the passphrase as secret `k`, and reads its first sector."""
    secret = ["--object", f"secret,id=k,data={password.decode()}"]
    done = subprocess.run(
        ["qemu-io", "-r", "-c", "read 0 512", "--image-opts", image_options, *secret],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or "cannot unlock any keyslot" in done.stderr, done.stderr + done.stdout
    return done.returncode == 0
