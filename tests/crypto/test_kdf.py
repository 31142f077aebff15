from __future__ import annotations

import hashlib
import time

import pytest

from qmpd.crypto import kdf
from qmpd.crypto.steps import run
from qmpd.errors import Error


@pytest.mark.parametrize(
    ("iterations", "derived"),
    [  # RFC 6070, section 2
        (1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
        (2, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
        (4096, "4b007901b765489abead49d926f721d065a429c1"),
    ],
)
def test_pbkdf2_gives_the_vectors_of_rfc_6070(iterations: int, derived: str) -> None:
    assert kdf.pbkdf2("sha1", b"password", b"salt", iterations, 20).hex() == derived


@pytest.mark.parametrize("name", ["sha1", "sha256", "sha512"])
def test_the_password_may_be_any_buffer(name: str) -> None:
    expected = hashlib.pbkdf2_hmac(name, b"abc123", b"s" * 32, 1000, 64)
    for password in (b"abc123", bytearray(b"abc123"), memoryview(b"abc123")):
        assert kdf.pbkdf2(name, password, b"s" * 32, 1000, 64) == expected


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(Error, match="^Hash algorithm 'crc32' not supported$"):
        kdf.pbkdf2("crc32", b"", b"", 1, 20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that takes 1 microsecond for each iteration, and for nothing else."""
    now = 0.0

    def derive(hash_name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytearray:
        nonlocal now
        now += iterations / 1e6
        return bytearray(length)

    monkeypatch.setattr(kdf, "pbkdf2", derive)
    monkeypatch.setattr("time.thread_time", lambda: now)


def test_no_time_at_all_still_gives_the_least_iterations() -> None:
    assert run(kdf.calibrating("sha256", 0, 32)) == kdf.MIN_ITERATIONS


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("milliseconds", [10, 25, 2000, 900_000])
def test_iterations_are_as_many_as_the_time_asked_for_allows(milliseconds: int) -> None:
    assert run(kdf.calibrating("sha512", milliseconds, 32)) == pytest.approx(1000 * milliseconds, rel=1e-3)
    assert run(kdf.calibrating("sha512", milliseconds, 32, share=8)) == pytest.approx(
        125 * milliseconds, rel=1e-3
    )


@pytest.mark.usefixtures("clock")
def test_a_short_time_is_measured_in_a_shorter_one_than_a_long_time() -> None:
    taken = []
    for milliseconds in (1, 10, 2000):
        start = time.thread_time()
        run(kdf.calibrating("sha512", milliseconds, 32))
        taken.append(time.thread_time() - start)
    assert taken == sorted(set(taken))


@pytest.mark.usefixtures("clock")
def test_a_hash_for_which_qemu_is_quicker_gets_a_tenth_more() -> None:
    assert run(kdf.calibrating("sha256", 2000, 32)) == pytest.approx(2_200_000, rel=1e-3)


@pytest.mark.usefixtures("clock")
def test_more_iterations_than_would_be_opened_are_refused() -> None:
    run(kdf.calibrating("sha512", 999_000, 32))
    with pytest.raises(
        Error, match=r"^PBKDF iterations 1[0-9]{9} larger than 1000000000: Numerical result out of range$"
    ):
        run(kdf.calibrating("sha512", 1_002_000, 32))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("milliseconds", "complaint"),
    [
        (10**10, r"[0-9]+ larger than 4294967295"),
        (10**14, r"[0-9]+ too large to scale"),
        (-1, r"[0-9]+ too large to scale"),
    ],
)
def test_absurd_times_are_refused_as_by_qemu(milliseconds: int, complaint: str) -> None:
    with pytest.raises(Error, match=f"^PBKDF iterations {complaint}: Numerical result out of range$"):
        run(kdf.calibrating("sha512", milliseconds, 32))


@pytest.mark.usefixtures("clock")
def test_a_measurement_can_be_stopped_after_each_of_its_parts() -> None:
    assert len(list(kdf.calibrating("sha512", 2000, 32))) > 8
