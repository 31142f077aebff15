"""Who may have an image together with whom: the same with qmpd as with QEMU in its place.

One *holder* has an image in one of the ways in which daemons have them, and
another comes.  Either is a program of QEMU's; in the place of the other we put
qemu-storage-daemon (or a machine of QEMU's, for disks) and qmpd in turn, and
compare what comes of it, by exit status and message.  So no expectation is
written here: QEMU gives them all.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CHECKOUT, PATIENCE, QMPD, STORAGE_DAEMON, SYSTEM, CommandError, RunningDaemon
from locked_images import (
    DEVICE_WAYS,
    KINDS,
    MAKERS,
    SECRET,
    SIZE,
    UNLOCKED,
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

#: The programs that come second: the image's options take the place of IMAGE, or UNLOCKED.
PROGRAMS: Final[Mapping[str, tuple[str, ...]]] = {
    "qemu-io -r": ("qemu-io", *SECRET, "--image-opts", "-r", "-c", "length", "IMAGE"),
    "qemu-io": ("qemu-io", *SECRET, "--image-opts", "-c", "length", "IMAGE"),
    "qemu-io -U -r": ("qemu-io", *SECRET, "--image-opts", "-U", "-r", "-c", "length", "IMAGE"),
    "qemu-io -U": ("qemu-io", *SECRET, "--image-opts", "-U", "-c", "length", "IMAGE"),
    "qemu-io unlocked": ("qemu-io", *SECRET, "--image-opts", "-c", "length", "UNLOCKED"),
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
    "amend": ("qemu-img", "amend", *SECRET, "--image-opts", "-o", "AMEND", "IMAGE"),
    "snapshot -l": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-l", "IMAGE"),
    "snapshot -U -l": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-U", "-l", "IMAGE"),
    "snapshot -c": ("qemu-img", "snapshot", *SECRET, "--image-opts", "-c", "one", "IMAGE"),
}

#: What is amended, by the kind of image.  Keyslot 5 is empty, so that nothing needs to be derived.
AMEND: Final[Mapping[str, str]] = {
    "raw": "size=1M",
    "luks": "state=inactive,keyslot=5",
    "luks-detached": "state=inactive,keyslot=5",
    "qcow2": "lazy_refcounts=on",
    "qcow2-luks": "encrypt.format=luks,encrypt.state=inactive,encrypt.keyslot=5",
}

#: Those that hold an image until their standard input ends.
HOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    name: ("stdbuf", "--output=L", "qemu-io", *SECRET, "--image-opts", *options)
    for name, options in {
        "qemu-io -r": ("-r", "IMAGE"),
        "qemu-io": ("IMAGE",),
        "qemu-io -U -r": ("-U", "-r", "IMAGE"),
        "qemu-io unlocked": ("UNLOCKED",),
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


def image_words(kind: Kind, stem: str) -> dict[str, str]:
    """What programs are given for an image."""
    return {"IMAGE": kind.words(stem), "UNLOCKED": kind.words(stem, file=UNLOCKED)}


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
            words = {**image_words(kind, stem), "OUT": f"{stem}.out", "AMEND": AMEND[kind.name]}
            return {
                f"{kind.name} {name} / {second}": run([words.get(word, word) for word in command], directory)
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
                words = image_words(kind, image(kind, name))
                program = subprocess.Popen(
                    [words.get(word, word) for word in command],
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


#: The names of locks in a refusal.
_LOCK: Final = re.compile(r'Failed to get (?:shared )?"[a-z ]+" lock')


def amend(daemon: RunningDaemon, node: str = "n") -> str:
    """Add a key to a node; what the command, or else its job, complains of."""
    options = {"driver": "luks", "state": "active", "new-secret": "pw", "iter-time": 1}
    try:
        daemon.execute("x-blockdev-amend", {"job-id": "j", "node-name": node, "options": options})
    except CommandError as error:
        return error.desc
    daemon.monitor.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    (job,) = daemon.execute("query-jobs")
    daemon.execute("job-dismiss", {"id": "j"})
    return str(job.get("error", ""))


def test_qmpd_amends_luks_only_where_qemu_img_may(in_use: tuple[Path, list[tuple[Kind, str, str]]]) -> None:
    """QEMU's daemons abort when keyslots change, so qemu-img, which opens images alike, is in our place."""
    directory, held = in_use
    answers: dict[str, tuple[list[str], list[str]]] = {}
    with running(QMPD, directory, "amending") as holder:
        for kind, name, stem in held:
            if kind.name not in ("luks", "luks-detached"):
                continue
            command = ["qemu-img", "amend", *SECRET, "--image-opts", "-o", AMEND[kind.name], kind.words(stem)]
            qemu = run(command, directory)
            before = [(directory / file).read_bytes() for file in kind.files(stem)]
            holder.daemon.execute("blockdev-add", {**kind.blockdev(stem), "node-name": "n"})
            ours = amend(holder.daemon)
            if ours:
                assert [(directory / file).read_bytes() for file in kind.files(stem)] == before
            holder.daemon.execute("blockdev-del", {"node-name": "n"})
            assert not held_locks(holder.daemon.process.pid, directory)
            answers[f"{kind.name} {name}"] = _LOCK.findall(qemu), _LOCK.findall(ours)
    assert any(ours for _, ours in answers.values())
    assert not {name: both for name, both in answers.items() if both[0] != both[1]}


def test_two_daemons_have_disks_on_one_luks_image_only_if_they_share_it(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, masters: Path
) -> None:
    """What QEMU's test 296 does with two machines: a disk in each, and then a new key."""
    kind = KINDS[1]
    kind.copy(masters, tmp_path, kind.name)
    first, second = (Holder(start_daemon(*SECRET, name=name)) for name in ("first", "second"))
    options = kind.blockdev(kind.name)

    plain = DEVICE_WAYS["disk"]
    assert first.take(options, plain)[0] == []
    assert second.take(options, plain)[0] == ['device_add: Failed to get "write" lock']
    assert second.take(options, DEVICE_WAYS["shared disk"])[0] == ['device_add: Failed to get "write" lock']
    for holder in (first, second):
        holder.daemon.kill()

    first, second = (Holder(start_daemon(*SECRET, name=name)) for name in ("third", "fourth"))
    shared = DEVICE_WAYS["shared disk"]
    refused, let_go = first.take(options, shared)
    assert refused == []
    assert second.take(options, shared)[0] == []
    for holder in (first, second):
        node = holder.daemon.execute("query-block")[0]["inserted"]["node-name"]
        before = (tmp_path / "luks.img").read_bytes()
        assert amend(holder.daemon, node) == 'Failed to get shared "consistent read" lock'
        assert (tmp_path / "luks.img").read_bytes() == before
    let_go()
    assert amend(second.daemon, node) == ""
    # It has given back what nobody else might have meanwhile.
    assert first.take(options, shared)[0] == []


def test_on_the_command_line_a_refusal_names_the_image(
    in_use: tuple[Path, list[tuple[Kind, str, str]]],
) -> None:
    directory, held = in_use
    (stem,) = [stem for kind, name, stem in held if kind.name == "qcow2" and name == "qemu-io"]
    option = f"driver=qcow2,node-name=n,file.driver=file,file.filename={stem}.img"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    said = []
    for program in (STORAGE_DAEMON, QMPD):
        ended = subprocess.run(
            [*program, "--blockdev", option],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        said.append((ended.returncode, ended.stderr.partition(": ")[2]))
    assert said[0] == said[1]
    assert said[1][1].endswith(f"Is another process using the image [{stem}.img]?\n")
