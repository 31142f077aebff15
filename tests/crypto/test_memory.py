from __future__ import annotations

import copy
import mmap
import os
import pickle
import random
import subprocess
import sys
import traceback

import pytest
from daemons import CHECKOUT
from process_memory import search

from qmpd.crypto import memory
from qmpd.crypto.memory import KeyBuffer, KeyMemory, overwrite

PAGE = mmap.PAGESIZE
KEY = b"\x5a" * 64


def run(script: str) -> str:
    prefix = "import os, resource\nfrom qmpd.crypto.memory import KeyMemory\n"
    result = subprocess.run(
        [sys.executable, "-c", prefix + script],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_new_buffer_holds_zeroes() -> None:
    for length in (0, 1, 64, 65, PAGE // 2, PAGE // 2 + 1, 256_000):
        buffer = KeyMemory().take(length)
        assert len(buffer) == length
        assert buffer.data == bytes(length)


def test_a_buffer_is_wiped_at_the_end_of_a_with() -> None:
    with KeyMemory().copy_of(KEY) as buffer:
        kept = buffer.data
        assert kept == KEY
    assert kept == bytes(64)
    buffer.wipe()


def test_a_buffer_is_wiped_although_the_with_ends_by_an_exception() -> None:
    with pytest.raises(RuntimeError), KeyMemory().copy_of(KEY) as buffer:
        raise RuntimeError
    assert buffer.data == bytes(64)


def test_a_buffer_that_nobody_wiped_is_wiped_when_nobody_has_it() -> None:
    keys = KeyMemory()
    neighbour = keys.take(64)
    lost = keys.copy_of(KEY)
    pages = keys._pages[0]._map
    assert KEY in pages[:]
    del lost
    assert KEY not in pages[:]
    assert len(neighbour) == 64


def test_what_was_kept_of_a_key_never_shows_another() -> None:
    keys = KeyMemory()
    with keys.copy_of(KEY) as buffer:
        kept = buffer.data[8:16]
    del buffer
    others = [keys.copy_of(b"\x77" * 64) for _ in range(3 * PAGE // 64)]
    assert kept == bytes(8)
    assert all(other.data == b"\x77" * 64 for other in others)


def test_memory_is_used_again() -> None:
    keys = KeyMemory()
    for _ in range(10 * PAGE // 64):
        keys.copy_of(KEY).wipe()
    assert len(keys._pages) == 1


def test_memory_that_nobody_uses_goes_back_to_the_system() -> None:
    keys = KeyMemory()
    many = [keys.take(64) for _ in range(5 * PAGE // 64)]
    assert len(keys._pages) == 5
    many.clear()
    keys.take(1)
    assert len(keys._pages) == 1


def test_buffers_of_all_lengths_keep_out_of_each_others_way() -> None:
    chance = random.Random(4)
    keys = KeyMemory()
    held: list[tuple[bytes, KeyBuffer]] = []
    for _ in range(2000):
        if held and chance.random() < 0.45:
            expected, buffer = held.pop(chance.randrange(len(held)))
            assert buffer.data == expected
        else:
            value = chance.randbytes(chance.choice((1, 16, 32, 63, 64, 65, 200, 1000, 2048, 3000)))
            held.append((value, keys.copy_of(value)))
    assert all(buffer.data == expected for expected, buffer in held)


def test_no_text_shows_what_is_in_a_buffer() -> None:
    buffer = KeyMemory().copy_of(b"passphrase")
    shown = f"{buffer} {buffer!r} {buffer.data!r} {vars(KeyMemory())}"
    try:
        raise ValueError(buffer)
    except ValueError as error:
        shown += "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert repr(buffer) == "<KeyBuffer of 10 bytes>"
    assert "passphrase" not in shown


def test_a_buffer_is_neither_copied_nor_pickled() -> None:
    buffer = KeyMemory().copy_of(KEY)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            attempt(buffer)
    with pytest.raises(TypeError):
        bytes(buffer)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        pickle.dumps(buffer.data)


def test_a_shortened_buffer_keeps_nothing_of_the_rest() -> None:
    buffer = KeyMemory().copy_of(b"password\x08\x08\x08\x08\x08\x08\x08\x08")
    whole = buffer.data
    buffer.shorten(8)
    assert buffer.data == b"password"
    assert whole == b"password" + bytes(8)


def test_a_library_s_result_is_overwritten_and_no_constant() -> None:
    result = bytes(bytearray(KEY))
    overwrite(result)
    assert result == bytes(64)
    overwrite(bytes(bytearray(b"x")))
    overwrite(b"")
    assert bytes([120]) == b"x"


@pytest.mark.parametrize("length", [64, 256_000])
def test_the_kernel_says_that_a_buffer_is_locked_and_in_no_core_dump(length: int) -> None:
    buffer = KeyMemory().take(length)
    buffer.data[:64] = os.urandom(64)
    places = search(os.getpid(), {"key": bytes(buffer.data[:64])})
    flags = [place.flags for place in places if "dd" in place.flags]
    assert len(flags) == 1
    assert "wf" in flags[0]
    assert ("lo" in flags[0]) == buffer.locked


def test_keys_of_a_thousand_disks_are_locked_in_64_kib() -> None:
    script = """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.getuid() == 0:
    os.setuid(65534)  # who may lock any amount would have no limit
keys = KeyMemory()
held = [keys.copy_of(bytes([n % 256]) * 64) for n in range(1100)]
assert all(key.data == bytes([n % 256]) * 64 for n, key in enumerate(held))
print([key.locked for key in held].index(False), sum(key.locked for key in held))
"""
    assert run(script) == "1024 1024\n"


def test_where_nothing_may_be_locked_everything_goes_on_and_says_so() -> None:
    script = """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)
for length in (64, 256000):
    with KeyMemory().copy_of(bytes(range(64)) * (length // 64)) as key:
        print(key.locked, bytes(key.data[:3]))
    print(any(key.data))
"""
    assert run(script) == "False b'\\x00\\x01\\x02'\nFalse\n" * 2


def test_a_forked_process_has_no_keys() -> None:
    script = """
key = KeyMemory().copy_of(bytes(range(1, 65)))
child = os.fork()
if child == 0:
    os._exit(any(key.data))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bytes(key.data) == bytes(range(1, 65)))
"""
    assert run(script) == "0 True\n"


def test_a_system_without_these_calls_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADV_WIPEONFORK", 9999)
    monkeypatch.setattr(memory, "_lock", lambda pages: False)
    buffer = KeyMemory().copy_of(KEY)
    assert buffer.data == KEY
    assert not buffer.locked
