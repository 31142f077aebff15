"""Who may have an image together with whom: the same with qmpd as with QEMU in its place.

One *holder* has an image in one of the ways in which daemons have them, and
another comes.  Either is a program of QEMU's; in the place of the other we put
qemu-storage-daemon (or a machine of QEMU's, for disks) and qmpd in turn, and
compare what comes of it, by exit status and message.  So no expectation is
written here: QEMU gives them all.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import QMPD, STORAGE_DAEMON, SYSTEM, RunningDaemon
from locked_images import (
    DEVICE_WAYS,
    KINDS,
    MAKERS,
    SECRET,
    SIZE,
    WAYS,
    Holder,
    Kind,
    Way,
    held_locks,
    make_masters,
    options_for,
    run,
)

pytestmark = pytest.mark.peer("qemu-storage-daemon", "qemu-img", "qemu-io", "qemu-system-x86_64", *MAKERS)

#: The programs that come second: the image's options take the place of IMAGE.
PROGRAMS: Final[Mapping[str, tuple[str, ...]]] = {
    "qemu-io -r": ("qemu-io", *SECRET, "--image-opts", "-r", "-c", "length", "IMAGE"),
    "qemu-io": ("qemu-io", *SECRET, "--image-opts", "-c", "length", "IMAGE"),
    "qemu-io -U -r": ("qemu-io", *SECRET, "--image-opts", "-U", "-r", "-c", "length", "IMAGE"),
    "qemu-io -U": ("qemu-io", *SECRET, "--image-opts", "-U", "-c", "length", "IMAGE"),
    "qemu-io unlocked": ("qemu-io", *SECRET, "--image-opts", "-c", "length", "IMAGE,file.locking=off"),
    "info": ("qemu-img", "info", *SECRET, "--image-opts", "IMAGE"),
    "info -U": ("qemu-img", "info", *SECRET, "--image-opts", "-U", "IMAGE"),
    "check": ("qemu-img", "check", *SECRET, "--image-opts", "IMAGE"),
    "check -U": ("qemu-img", "check", *SECRET, "--image-opts", "-U", "IMAGE"),
    "check -r": ("qemu-img", "check", *SECRET, "--image-opts", "-r", "all", "IMAGE"),
    "map": ("qemu-img", "map", *SECRET, "--image-opts", "IMAGE"),
    "compare": ("qemu-img", "compare", *SECRET, "--image-opts", "IMAGE", f"driver=null-co,size={SIZE}"),
    "convert from": ("qemu-img", "convert", *SECRET, "--image-opts", "-O", "raw", "IMAGE", "OUT"),
    "convert -U from": ("qemu-img", "convert", *SECRET, "--image-opts", "-U", "-O", "raw", "IMAGE", "OUT"),
    "convert to": (
        *("qemu-img", "convert", *SECRET, "--image-opts", "-n", "--target-image-opts"),
        *("driver=null-co,size=64k,read-zeroes=on", "IMAGE"),
    ),
    "resize": ("qemu-img", "resize", *SECRET, "--image-opts", "IMAGE", "+64k"),
    "amend": ("qemu-img", "amend", *SECRET, "--image-opts", "-o", "lazy_refcounts=on", "IMAGE"),
    "snapshot -l": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-l", "IMAGE"),
    "snapshot -U -l": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-U", "-l", "IMAGE"),
    "snapshot -c": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-c", "one", "IMAGE"),
}

#: Those that hold an image until their standard input ends.
HOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    name: ("stdbuf", "--output=L", "qemu-io", *SECRET, "--image-opts", *options)
    for name, options in {
        "qemu-io -r": ("-r", "IMAGE"),
        "qemu-io": ("IMAGE",),
        "qemu-io -U -r": ("-U", "-r", "IMAGE"),
        "qemu-io unlocked": ("IMAGE,file.locking=off",),
    }.items()
}

#: For a machine without a guest.
_MACHINE: Final = ("-nodefaults", "-display", "none", "-machine", "pc", "-S", "-accel", "tcg")

AT_A_TIME: Final = 2


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masters(tmp_path_factory.mktemp("masters"))


@contextmanager
def running(program: tuple[str, ...], directory: Path, name: str) -> Iterator[Holder]:
    """A daemon that works in `directory`."""
    machine = _MACHINE if program == SYSTEM else ()
    daemon = RunningDaemon(program, [*machine, *SECRET], directory, name)
    try:
        yield Holder(daemon)
        daemon.assert_alive()
    finally:
        daemon.kill()


def stem_of(kind: Kind, way: str) -> str:
    return f"{kind.name}-{way}".replace(" ", "_").replace(",", "")


def programs_against(
    program: tuple[str, ...], directory: Path, masters: Path, ways: Mapping[str, Way]
) -> dict[str, Any]:
    """What becomes of each program while the daemon has an image in each way; and what is locked."""
    outcomes: dict[str, Any] = {}
    directory.mkdir()
    with running(program, directory, "daemon") as holder:
        held = []
        for kind in KINDS:
            for name, way in ways.items():
                stem = stem_of(kind, name)
                kind.copy(masters, directory, stem)
                outcomes[f"{kind.name} {name}"], _ = holder.take(options_for(kind, way, stem), way)
                held.append((kind, name, stem))
        pid = holder.daemon.process.pid
        outcomes["locks"] = held_locks(pid, directory)

        def play(kind: Kind, name: str, stem: str) -> dict[str, str]:
            """One after the other: they would shut each other out."""
            image, out = kind.words(stem), f"{stem}.out"
            return {
                f"{kind.name} {name} / {second}": run(
                    [word.replace("IMAGE", image).replace("OUT", out) for word in command], directory
                )
                for second, command in PROGRAMS.items()
            }

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            for outcome in pool.map(lambda each: play(*each), held):
                outcomes |= outcome
        outcomes["locks afterwards"] = held_locks(pid, directory)
    return outcomes


def differences(qemu: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What is not the same."""
    assert qemu.keys() == ours.keys()
    return "\n".join(
        f"{name}\n  QEMU: {qemu[name]}\n  qmpd: {ours[name]}" for name in qemu if qemu[name] != ours[name]
    )


PLACES: Final = [
    pytest.param(STORAGE_DAEMON, WAYS, id="nodes and exports"),
    pytest.param(SYSTEM, DEVICE_WAYS, id="disks"),
]


@pytest.mark.parametrize(("peer", "ways"), PLACES)
def test_programs_get_the_same_answer_while_qmpd_has_an_image(
    peer: tuple[str, ...], ways: Mapping[str, Way], tmp_path: Path, masters: Path
) -> None:
    qemu = programs_against(peer, tmp_path / "qemu", masters, ways)
    ours = programs_against(QMPD, tmp_path / "qmpd", masters, ways)
    assert qemu["locks"], "there is nothing to compare"
    assert not (report := differences(qemu, ours)), report


@pytest.fixture(scope="module")
def in_use(
    masters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[tuple[Kind, str, str]]]]:
    """A directory with images that programs of QEMU's have: kind, way, and the beginning of its files.

    What they have locked is all that others see of them, so of those of a kind that have locked the
    same, one is enough.
    """
    directory = tmp_path_factory.mktemp("in-use")
    held: list[tuple[Kind, str, str]] = []
    met: list[tuple[str, object]] = []

    def image(kind: Kind, name: str) -> str:
        stem = stem_of(kind, name)
        kind.copy(masters, directory, stem)
        return stem

    def is_held(kind: Kind, name: str, pid: int) -> None:
        stem = stem_of(kind, name)
        locks = held_locks(pid, directory)
        seen = kind.name, [locks.get(file) for file in kind.files(stem)]
        if seen not in met:
            met.append(seen)
            held.append((kind, name, stem))

    with ExitStack() as stack:
        for kind in KINDS:
            for name, command in HOLDERS.items():
                words = kind.words(image(kind, name))
                program = subprocess.Popen(
                    [word.replace("IMAGE", words) for word in command],
                    cwd=directory,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                stack.callback(program.communicate)
                assert program.stdin is not None
                assert program.stdout is not None
                program.stdin.write(b"length\n")
                program.stdin.flush()
                assert program.stdout.readline(), "it did not open the image"
                is_held(kind, name, program.pid)
        for peer, ways in ((STORAGE_DAEMON, WAYS), (SYSTEM, DEVICE_WAYS)):
            holder = stack.enter_context(running(peer, directory, f"holder-{peer[-1]}"))
            for kind in KINDS:
                for name, way in ways.items():
                    stem = image(kind, name)
                    holder.take(options_for(kind, way, stem), way)
                    is_held(kind, name, holder.daemon.process.pid)
        yield directory, held


def second_to_come(
    program: tuple[str, ...],
    directory: Path,
    name: str,
    ways: Mapping[str, Way],
    held: list[tuple[Kind, str, str]],
) -> dict[str, Any]:
    """What becomes of each way to open images that others have."""
    outcomes: dict[str, Any] = {}
    with running(program, directory, name) as second:
        pid = second.daemon.process.pid
        for kind, holder, stem in held:
            for way_name, way in ways.items():
                refused, let_go = second.take(options_for(kind, way, stem), way)
                locks = held_locks(pid, directory)
                let_go()
                remaining = held_locks(pid, directory)
                outcomes[f"{kind.name} {holder} / {way_name}"] = refused, locks, remaining
    return outcomes


@pytest.mark.parametrize(("peer", "ways"), PLACES)
def test_qmpd_gets_the_same_answer_while_programs_have_an_image(
    peer: tuple[str, ...],
    ways: Mapping[str, Way],
    in_use: tuple[Path, list[tuple[Kind, str, str]]],
) -> None:
    qemu = second_to_come(peer, in_use[0], "qemu", ways, in_use[1])
    ours = second_to_come(QMPD, in_use[0], "qmpd", ways, in_use[1])
    assert any(refused for refused, _, _ in qemu.values()), "nothing was refused"
    assert all(not remaining for _, _, remaining in ours.values())
    assert not (report := differences(qemu, ours)), report
