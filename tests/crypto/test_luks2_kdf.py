"""The costs of LUKS2's key derivations: how they are chosen, and which are refused."""

from __future__ import annotations

import pytest

from qmpd.crypto import luks2_kdf
from qmpd.crypto.luks2_kdf import MAX_LANES, Kdf, calibrating
from qmpd.crypto.steps import run
from qmpd.errors import Error


def gibibyte_in_a_second(trial: Kdf, key_bytes: int) -> float:
    return trial.memory * trial.iterations / (1 << 20)


@pytest.mark.parametrize(
    ("milliseconds", "memory", "chosen"),
    [
        # As much memory as four passes have time for ...
        (2000, 4 << 20, (1 << 19, 4)),
        # ... never more than it may have, but then more passes ...
        (8000, 1 << 20, (1 << 20, 8)),
        (1000, 1 << 10, (1 << 10, 1024)),
        # ... and not less than cryptsetup takes, unless that is the bound.
        (1, 1 << 20, (1 << 16, 4)),
        (1, 32, (32, 32)),
        (0, 32, (32, 4)),
    ],
)
def test_argon2_gets_the_memory_that_fits_into_the_time(
    milliseconds: int, memory: int, chosen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luks2_kdf, "_seconds", gibibyte_in_a_second)
    kdf = run(calibrating("argon2id", milliseconds, 64, memory=memory, cpus=4))
    assert (kdf.memory, kdf.iterations, kdf.cpus) == (*chosen, 4)


@pytest.mark.parametrize("memory", [32, 1000])
def test_what_was_measured_here_is_within_bounds(memory: int) -> None:
    kdf = run(calibrating("argon2id", 20, 64, memory=memory, cpus=2))
    kdf.check()
    assert (kdf.memory, kdf.iterations > 4) == (memory, True)


@pytest.mark.parametrize(
    ("kdf", "refusal"),
    [
        (Kdf("argon2id", bytes(32), 4, memory=1 << 22, cpus=MAX_LANES + 1), "with 65 lanes is not supported"),
        (Kdf("argon2id", bytes(32), 4, memory=31, cpus=4), "needs more memory than 31 KiB"),
        (Kdf("argon2i", bytes(32), 4097, memory=1 << 20, cpus=4), "takes too long"),
        # A pass over little memory is not for nothing.
        (Kdf("argon2i", bytes(32), 1 << 23, memory=32, cpus=4), "takes too long"),
    ],
)
def test_costs_that_would_take_days_or_thousands_of_threads_are_refused(kdf: Kdf, refusal: str) -> None:
    with pytest.raises(Error, match=refusal):
        kdf.derive_into(b"password", memoryview(bytearray(64)))
