"""Passed descriptors that are kept.  Replies and errors are those that were seen in QEMU 10.0.2."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpd.descriptors import Allowance, FdSets, NamedDescriptors, Passed
from qmpd.errors import Error

Opened = Callable[[int], int]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def opened(image: Path) -> Iterator[Opened]:
    """Open the image with these flags."""
    descriptors: list[int] = []

    def open_image(flags: int = os.O_RDWR) -> int:
        descriptors.append(os.open(image, flags))
        return descriptors[-1]

    yield open_image
    for descriptor in descriptors:
        if is_open(descriptor):
            os.close(descriptor)


# -- unclaimed


def test_only_the_descriptor_that_was_passed_last_is_kept(opened: Opened) -> None:
    passed, first, second = Passed(), opened(os.O_RDWR), opened(os.O_RDWR)
    passed.put(first)
    passed.put(second)
    assert not is_open(first)
    assert passed.claim() == second


def test_a_descriptor_is_claimed_once(opened: Opened) -> None:
    passed = Passed()
    passed.put(opened(os.O_RDWR))
    passed.claim()
    assert not passed
    with pytest.raises(Error, match=r"^No file descriptor supplied via SCM_RIGHTS$"):
        passed.claim()


def test_what_nobody_claims_is_closed_in_the_end(opened: Opened) -> None:
    passed, descriptor = Passed(), opened(os.O_RDWR)
    passed.put(descriptor)
    passed.close()
    passed.close()
    assert not is_open(descriptor)


# -- under a name


def test_who_uses_a_name_takes_the_descriptor_away(opened: Opened) -> None:
    named, descriptor = NamedDescriptors(), opened(os.O_RDWR)
    named.add("", descriptor)
    assert named.take("") == descriptor
    with pytest.raises(Error, match=r"^File descriptor named '' has not been found$"):
        named.take("")


def test_a_name_that_is_given_again_closes_the_descriptor_that_had_it(opened: Opened) -> None:
    named, first, second = NamedDescriptors(), opened(os.O_RDWR), opened(os.O_RDWR)
    named.add("x", first)
    named.add("x", second)
    assert not is_open(first)
    named.remove("x")
    assert not is_open(second)
    with pytest.raises(Error, match=r"^File descriptor named 'x' not found$"):
        named.remove("x")


def test_a_descriptor_for_a_name_that_begins_with_a_digit_is_closed(opened: Opened) -> None:
    named, descriptor = NamedDescriptors(), opened(os.O_RDWR)
    with pytest.raises(Error, match=r"^Parameter 'fdname' expects a name not starting with a digit$"):
        named.add("1x", descriptor)
    assert not is_open(descriptor)


def test_no_more_descriptors_are_kept_than_is_allowed_under_names_and_in_sets(opened: Opened) -> None:
    allowance = Allowance(2)
    named, sets = NamedDescriptors(allowance), FdSets(allowance)
    named.add("x", opened(os.O_RDWR))
    sets.add(opened(os.O_RDWR), 3)
    for keep in (lambda fd: named.add("y", fd), lambda fd: sets.add(fd, 4)):
        descriptor = opened(os.O_RDWR)
        with pytest.raises(Error, match=r"^No more than 2 file descriptors that were passed can be kept$"):
            keep(descriptor)
        assert not is_open(descriptor)
    assert [entry["fdset-id"] for entry in sets.query()] == [3]
    sets.remove(3)
    named.add("y", opened(os.O_RDWR))
    named.close()
    sets.add(opened(os.O_RDWR))
    sets.add(opened(os.O_RDWR))


def test_at_the_limit_a_name_can_still_be_given_another_descriptor(opened: Opened) -> None:
    named = NamedDescriptors(Allowance(1))
    named.add("x", opened(os.O_RDWR))
    named.add("x", opened(os.O_RDWR))


# -- in sets


def test_a_set_without_a_number_gets_the_lowest_that_is_free(opened: Opened) -> None:
    sets = FdSets()
    numbers = [sets.add(opened(os.O_RDWR), number)["fdset-id"] for number in (None, 1, None, None)]
    assert numbers == [0, 1, 2, 3]
    sets.remove(1)
    assert sets.add(opened(os.O_RDWR))["fdset-id"] == 1


def test_sets_are_listed_with_the_highest_number_first_and_descriptors_as_they_came(opened: Opened) -> None:
    sets = FdSets()
    first, second, third = (opened(os.O_RDWR) for _ in range(3))
    sets.add(first, 5, "")
    sets.add(second, (1 << 63) - 1)
    assert sets.add(third, 5) == {"fd": third, "fdset-id": 5}
    assert sets.query() == [
        {"fds": [{"fd": second}], "fdset-id": (1 << 63) - 1},
        {"fds": [{"fd": first, "opaque": ""}, {"fd": third}], "fdset-id": 5},
    ]


def test_a_descriptor_for_a_set_below_zero_is_closed(opened: Opened) -> None:
    descriptor = opened(os.O_RDWR)
    with pytest.raises(Error, match=r"^Parameter 'fdset-id' expects a non-negative value$"):
        FdSets().add(descriptor, -1)
    assert not is_open(descriptor)


def test_what_can_not_be_removed_is_named(opened: Opened) -> None:
    sets = FdSets()
    kept = opened(os.O_RDWR)
    sets.add(kept, 5)
    with pytest.raises(Error, match=r"^File descriptor named 'fdset-id:6' not found$"):
        sets.remove(6)
    with pytest.raises(Error, match=r"^File descriptor named 'fdset-id:-1, fd:-9' not found$"):
        sets.remove(-1, -9)
    with pytest.raises(Error, match=r"^File descriptor named 'fdset-id:5, fd:99999' not found$"):
        sets.remove(5, 99999)
    assert is_open(kept)


def test_one_descriptor_of_a_set_is_removed_and_the_others_stay(opened: Opened) -> None:
    sets = FdSets()
    gone, kept = opened(os.O_RDWR), opened(os.O_RDWR)
    sets.add(gone, 1)
    sets.add(kept, 1)
    sets.remove(1, gone)
    assert not is_open(gone)
    assert sets.query() == [{"fds": [{"fd": kept}], "fdset-id": 1}]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_the_descriptor_counts_that_was_opened_as_is_wanted(opened: Opened, flags: int) -> None:
    sets = FdSets()
    for each in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        sets.add(opened(each), 1)
    copy = sets.open("/dev/fdset/1", flags)
    assert fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_ACCMODE == flags
    assert fcntl.fcntl(copy, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    sets.close(copy)


def test_of_two_that_fit_the_newer_one_counts(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "newer").touch()
    sets = FdSets()
    sets.add(opened(os.O_RDWR), 1)
    sets.add(os.open(tmp_path / "newer", os.O_RDWR), 1)
    copy = sets.open("/dev/fdset/1", os.O_RDWR)
    assert os.readlink(f"/proc/self/fd/{copy}").endswith("/newer")
    sets.close(copy)
    sets.close_all()


def test_a_descriptor_of_another_file_is_not_the_same_opened_in_another_way(
    opened: Opened, tmp_path: Path
) -> None:
    (tmp_path / "another").touch()
    sets = FdSets()
    reading = opened(os.O_RDONLY)
    sets.add(reading, 1)
    sets.add(os.open(tmp_path / "another", os.O_RDWR), 1)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x2$"):
        sets.open("/dev/fdset/1", os.O_RDWR, same_as=reading)
    sets.add(opened(os.O_RDWR), 1)
    sets.close(sets.open("/dev/fdset/1", os.O_RDWR, same_as=reading))
    sets.close_all()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("2", os.O_RDONLY, "Failed to find fdset /dev/fdset/2"),
        ("1", os.O_RDWR, "Failed to find file descriptor with matching flags=0x2"),
        ("1", os.O_RDWR | os.O_CREAT, "Failed to find file descriptor with matching flags=0x42"),
        ("1", os.O_RDONLY | os.O_DIRECT, "Failed to find file descriptor with matching flags=0x4000"),
        ("x", os.O_RDONLY, "Could not parse fdset /dev/fdset/x"),
        ("", os.O_RDONLY, "Could not parse fdset /dev/fdset/"),
        ("1x", os.O_RDONLY, "Could not parse fdset /dev/fdset/1x"),
        ("-1", os.O_RDONLY, "Could not parse fdset /dev/fdset/-1"),
        ("2147483648", os.O_RDONLY, "Could not parse fdset /dev/fdset/2147483648"),
        ("9" * 5000, os.O_RDONLY, f"Could not parse fdset /dev/fdset/{'9' * 5000}"),
        ("0" * 5000 + "2", os.O_RDONLY, f"Failed to find fdset /dev/fdset/{'0' * 5000}2"),
    ],
)
def test_a_file_name_that_stands_for_no_descriptor_is_refused(
    opened: Opened, name: str, flags: int, message: str
) -> None:
    sets = FdSets()
    sets.add(opened(os.O_RDONLY), 1)
    with pytest.raises(Error) as refused:
        sets.open(f"/dev/fdset/{name}", flags)
    assert refused.value.desc == message


def test_numbers_are_read_as_the_c_library_does(opened: Opened) -> None:
    sets = FdSets()
    sets.add(opened(os.O_RDONLY), 2)
    for name in ("02", "+2", " 2"):
        sets.close(sets.open(f"/dev/fdset/{name}", os.O_RDONLY))


def test_a_descriptor_that_only_stands_for_a_name_can_not_be_opened(opened: Opened) -> None:
    sets = FdSets()
    descriptor = opened(os.O_PATH)
    sets.add(descriptor, 1)
    with pytest.raises(Error, match=rf"^Failed to dup\(\) given file descriptor fd={descriptor}$"):
        sets.open("/dev/fdset/1", os.O_RDONLY)


def test_a_set_in_use_is_there_until_its_last_user_closes(opened: Opened) -> None:
    sets = FdSets()
    sets.add(opened(os.O_RDWR), 1)
    first, second = (sets.open("/dev/fdset/1", os.O_RDWR) for _ in range(2))
    sets.remove(1)
    sets.remove(1)
    assert sets.query() == [{"fds": [], "fdset-id": 1}]
    sets.close(first)
    assert os.pread(second, 1, 0) == b"\0"
    sets.close(second)
    assert sets.query() == []


def test_a_set_that_was_emptied_in_use_takes_new_descriptors(opened: Opened) -> None:
    sets = FdSets()
    sets.add(opened(os.O_RDWR), 1)
    used = sets.open("/dev/fdset/1", os.O_RDWR)
    sets.remove(1)
    sets.add(opened(os.O_RDWR), 1)
    sets.close(used)
    assert [entry["fdset-id"] for entry in sets.query()] == [1]


def test_at_the_end_all_of_it_is_closed(opened: Opened) -> None:
    sets = FdSets()
    descriptors = [opened(os.O_RDWR) for _ in range(3)]
    for descriptor in descriptors:
        sets.add(descriptor)
    sets.close_all()
    assert not any(is_open(descriptor) for descriptor in descriptors)


# -- inherited


def test_an_inherited_descriptor_is_copied_as_often_as_it_is_named(opened: Opened) -> None:
    sets, descriptor = FdSets(), opened(os.O_RDWR)
    os.set_inheritable(descriptor, True)
    sets.adopt(descriptor, 1, "text")
    sets.adopt(descriptor, 1)
    sets.close_adopted()
    assert not is_open(descriptor)
    ((first, second),) = [entry["fds"] for entry in sets.query()]
    assert first["opaque"] == "text"
    assert is_open(first["fd"])
    assert is_open(second["fd"])
    sets.close_all()


def test_standard_output_can_not_be_adopted() -> None:
    with pytest.raises(Error, match=r"^fd cannot be a standard I/O stream$"):
        FdSets().adopt(1, 1)


def test_what_was_not_inherited_can_not_be_adopted(opened: Opened) -> None:
    own = opened(os.O_RDWR)
    for descriptor in (own, 99999, 1 << 40):
        with pytest.raises(Error, match=r"^fd is not valid or already in use$"):
            FdSets().adopt(descriptor, 1)
    assert is_open(own)
