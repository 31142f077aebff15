"""The key derivation functions of LUKS2: PBKDF2, argon2i and argon2id.

Every function here may take long and releases the interpreter lock while it
does: call it in a worker thread.

Source: LUKS2 On-Disk Format Specification 1.1, section 3.2.3; RFC 9106.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

from argon2.exceptions import HashingError
from argon2.low_level import ARGON2_VERSION, Type, hash_secret_raw

from qmpd.crypto import kdf
from qmpd.crypto.memory import Buffer, overwrite
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

#: What cryptsetup allows: the least and the most of each cost.
MIN_TIME: Final = 4
MIN_MEMORY: Final = 32
MAX_MEMORY: Final = 4 << 20
MAX_CPUS: Final = 4

#: The memory of a new key, in KiB, if nothing is said (cryptsetup's).
DEFAULT_MEMORY: Final = 1 << 20

#: More passes over the memory, counted in KiB, than this are refused: about an hour of one processor.
MAX_WORK: Final = 1 << 32

#: A pass takes at least as long as one over this much memory, in KiB: threads are begun for it.
_LEAST_PASS: Final = 1 << 10

#: More lanes than this are refused: each is a thread.
MAX_LANES: Final = 64


def usual_cpus() -> int:
    """The lanes of a new key: as many as there are processors, within bounds."""
    return max(1, min(MAX_CPUS, len(os.sched_getaffinity(0))))


def usual_memory() -> int:
    """The memory of a new key, in KiB: at most half of what the machine has (as cryptsetup takes it)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 10
    return min(DEFAULT_MEMORY, total // 2)


_TYPES: Final = {"argon2i": Type.I, "argon2id": Type.ID}

_TRIAL_SALT: Final = bytes(32)

#: No key is made with less memory than this, in KiB, however little time was asked for, unless that is all
#: that it may have (cryptsetup's).
_LEAST_CALIBRATED: Final = 1 << 16

#: A measurement shorter than this, in seconds, is taken twice.
_MEASURED_SECONDS: Final = 0.25

#: The memory of a derivation that is only there to be measured, in KiB, and how often it is done.
_TRIAL_MEMORY: Final = 1 << 16
_MEASUREMENTS: Final = 3


@dataclass(frozen=True)
class Kdf:
    """A key derivation function with its costs.

    :param kind: "pbkdf2", "argon2i" or "argon2id".
    :param iterations: of PBKDF2, or passes over argon2's memory.
    :param hash_name: of PBKDF2.
    :param memory: argon2's, in KiB.
    :param cpus: argon2's lanes, each of which may have a thread.
    """

    kind: str
    salt: bytes = field(repr=False)
    iterations: int
    hash_name: str = "sha256"
    memory: int = 0
    cpus: int = 0

    @property
    def work(self) -> int:
        """What the time grows with: iterations of PBKDF2, or KiB that argon2's passes go over."""
        return self.iterations * max(1, self.memory)

    def check(self) -> None:
        """Refuse costs that nobody can want.

        :raise Error: which.
        """
        if self.kind == "pbkdf2":
            if self.iterations > kdf.MAX_ITERATIONS:
                raise Error(
                    f"PBKDF2 iteration count {self.iterations} is more than the {kdf.MAX_ITERATIONS} allowed"
                )
        elif self.cpus > MAX_LANES:
            raise Error(f"argon2 with {self.cpus} lanes is not supported, only up to {MAX_LANES}")
        elif self.memory < 8 * self.cpus:
            raise Error(f"argon2 with {self.cpus} lanes needs more memory than {self.memory} KiB")
        elif max(self.memory, _LEAST_PASS) * self.iterations > MAX_WORK:
            raise Error(f"argon2 with {self.memory} KiB and {self.iterations} passes takes too long")

    def derive_into(self, password: Buffer, into: memoryview) -> None:
        """Derive as many bytes as `into` has.

        :raise Error: the costs are out of bounds, or there is not enough memory.
        """
        self.check()
        if self.kind == "pbkdf2":
            kdf.pbkdf2_into(self.hash_name, password, self.salt, self.iterations, into)
            return
        # The package takes nothing but bytes.
        secret = bytes(memoryview(password))  # a copy, whatever it was: it is overwritten
        try:
            derived = hash_secret_raw(
                secret,
                self.salt,
                self.iterations,
                self.memory,
                self.cpus,
                len(into),
                _TYPES[self.kind],
                ARGON2_VERSION,
            )
        except HashingError as error:
            raise Error(f"argon2 failed: {error}") from None
        finally:
            overwrite(secret)
        into[:] = derived
        overwrite(derived)

    def parameters(self) -> dict[str, Any]:
        """The costs by their names in the metadata, with the type and without the salt."""
        if self.kind == "pbkdf2":
            return {"type": self.kind, "hash": self.hash_name, "iterations": self.iterations}
        return {"type": self.kind, "time": self.iterations, "memory": self.memory, "cpus": self.cpus}


def calibrating(
    kind: str,
    milliseconds: int,
    key_bytes: int,
    *,
    hash_name: str = "sha256",
    memory: int = DEFAULT_MEMORY,
    cpus: int = MAX_CPUS,
) -> Steps[Kdf]:
    """Choose costs that take `milliseconds` here, in steps.

    As cryptsetup does it, argon2 gets as much memory as fits into the time with the fewest passes,
    and more passes when it has all that it may have.  A large memory is slower than a small one, so
    what is measured takes at least a quarter of the time.

    :param memory: the most that it may have, in KiB.
    :param cpus: lanes.
    :returns: the costs, with a salt that is none.
    """
    if kind == "pbkdf2":
        iterations = yield from kdf.calibrating(hash_name, milliseconds, key_bytes)
        return Kdf(kind, _TRIAL_SALT, iterations, hash_name)
    wanted = milliseconds / 1000
    trial = Kdf(kind, _TRIAL_SALT, MIN_TIME, memory=min(memory, _LEAST_CALIBRATED), cpus=cpus)
    least = trial.memory
    yield
    seconds = _seconds(trial, key_bytes)
    while seconds < wanted / 4 and trial.memory < memory:
        trial = replace(trial, memory=min(memory, trial.memory * 4))
        yield
        seconds = _seconds(trial, key_bytes)
    fitting = int(trial.memory * wanted / seconds)
    chosen = replace(trial, memory=max(least, min(fitting, memory)))
    if fitting > memory:
        passes = int(MIN_TIME * wanted / (seconds * memory / trial.memory))
        chosen = replace(chosen, iterations=max(MIN_TIME, passes))
    return chosen


def trial(derivation: Kdf, limit: int) -> Kdf:
    """A derivation that says how long another one takes, in a short time.

    :param limit: the most memory that it may have, in KiB.
    """
    if derivation.kind == "pbkdf2":
        return replace(derivation, salt=_TRIAL_SALT)
    # A header may ask for any number of threads.
    cpus = min(derivation.cpus, MAX_CPUS)
    memory = max(8 * cpus, min(derivation.memory, limit, _TRIAL_MEMORY))
    return replace(derivation, salt=_TRIAL_SALT, memory=memory, cpus=cpus, iterations=1)


def measuring(trial: Kdf, key_bytes: int) -> Steps[float]:
    """How much of argon2's :attr:`Kdf.work` takes a millisecond here, in steps.

    Of several measurements the fastest counts, because whatever disturbs one only slows it.
    """
    seconds = []
    for _ in range(_MEASUREMENTS):
        yield
        seconds.append(_seconds(trial, key_bytes))
    return trial.work / min(seconds) / 1000


def _seconds(trial: Kdf, key_bytes: int) -> float:
    """How long a derivation takes while the machine does nothing else: a busy one makes no weaker keys.

    Of time that passes and the processors' time, divided among them, the shorter one counts: the one contains
    what other processes do, the other what other threads do.
    """
    threads = max(1, min(trial.cpus, len(os.sched_getaffinity(0))))
    derived = memoryview(bytearray(key_bytes))
    shortest = float("inf")
    for _ in range(2):
        start, processors = time.perf_counter(), time.process_time()
        trial.derive_into(b"password", derived)
        passed = time.perf_counter() - start
        shortest = min(shortest, passed, (time.process_time() - processors) / threads)
        if passed > _MEASURED_SECONDS:
            break
    return max(shortest, 1e-6)
