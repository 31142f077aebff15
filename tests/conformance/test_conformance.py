"""qmpd and QEMU hold the same conversations; where they differ, ``expected.json`` says why.

Each file in ``cases/`` is one test.  It is played to QEMU and to qmpd by
``qmpdiff`` (README.md beside it), and fails on any step that differs and is
not listed, and on any listed step that does not differ any more: the list can
only shrink.  A step's key in the list is its number or a range ("4-7").

Each is played to the program of ours that has the reference's command line.
Conversations about devices are played to the storage daemon as well (``styles``
in the case), which takes them without a machine; what differs only there is
listed under the case's name with " (storage)".

Where QEMU itself is broken (``reference_broken``) there is nothing to compare:
qmpd only has to live through the conversation.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import peers
import pytest
from harness import load_qmpdiff

HERE: Final = Path(__file__).parent
CHECKOUT: Final = HERE.parent.parent
CASE_FILES: Final = sorted((HERE / "cases").glob("*.json"))
REFERENCES: Final = {"storage": "qemu-storage-daemon", "system": "qemu-system-x86_64"}
#: Our programs, by the command line that they have.
CANDIDATES: Final = {
    "storage": f"{sys.executable} -m qmpd",
    "system": f"{sys.executable} -m qmpd.cli.system",
}

#: Cases played at a time.  Most of a case's time is waiting, or key derivation in one of the daemons.
AT_A_TIME: Final = 2

#: Seconds for one step of a daemon; some steps ask for more.
PATIENCE: Final = 10

Results = Mapping[str, list[Any]]


qmpdiff = load_qmpdiff()


def needed_peers(path: Path) -> list[str]:
    """Name the programs that the case in *path* uses: its reference, and those in its shell lines."""
    text = path.read_text(encoding="utf-8")
    reference = REFERENCES[json.loads(text)["persona"]]
    return [name for name in peers.PEERS if name == reference or f"{name} " in text]


def load_expected() -> dict[str, dict[int, str]]:
    """Read ``expected.json``: {case: {step number: reason}}, with ranges of steps written out."""
    listed = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    expected: dict[str, dict[int, str]] = {}
    for case, steps in listed.items():
        expected[case] = {}
        for key, reason in steps.items():
            first, _, last = key.partition("-")
            for number in range(int(first), int(last or first) + 1):
                assert number not in expected[case], f"{case}: step {number} is listed twice"
                expected[case][number] = reason
    return expected


def styles(path: Path) -> list[str]:
    """Name the command lines of ours behind which the case in *path* is played."""
    case = json.loads(path.read_text(encoding="utf-8"))
    return case.get("styles", [case["persona"]])


#: What is played: a case, and a command line of ours.  The persona's own has the case's name as its id.
PLAYS: Final = [
    (path, style, path.stem if path.stem.startswith(f"{style}-") else f"{path.stem}-{style}")
    for path in CASE_FILES
    for style in styles(path)
]


def play(path: Path) -> tuple[Any, Results]:
    """Play the case in *path* to qmpd, in all styles, and to QEMU unless that is broken."""
    case = qmpdiff.Case.load(path)
    sides = {style: (CANDIDATES[style], style) for style in styles(path)}
    if not case.reference_broken:
        sides["QEMU"] = (REFERENCES[case.persona], case.persona)
    return case, qmpdiff.run_case(case, sides, PATIENCE, keep=False)


@pytest.fixture(scope="session")
def played(request: pytest.FixtureRequest) -> Iterator[Mapping[Path, Future[tuple[Any, Results]]]]:
    """The cases of this run, being played in the order of the tests."""
    wanted = [
        item.callspec.params["path"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == "test_conversation_is_the_same"
        and not any(peers.missing(name) for mark in item.iter_markers("peer") for name in mark.args)
    ]
    old_environment = dict(os.environ)
    old_core = resource.getrlimit(resource.RLIMIT_CORE)
    old_depth = sys.getrecursionlimit()
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, old_core[1]))  # daemons that abort leave no core
    sys.setrecursionlimit(20000)  # for deeply nested replies
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        yield {path: pool.submit(play, path) for path in wanted}
    finally:
        pool.shutdown(cancel_futures=True)
        sys.setrecursionlimit(old_depth)
        resource.setrlimit(resource.RLIMIT_CORE, old_core)
        os.environ.clear()
        os.environ.update(old_environment)


@pytest.mark.parametrize(
    ("path", "style"),
    [
        pytest.param(path, style, id=id_, marks=pytest.mark.peer(*needed_peers(path)))
        for path, style, id_ in PLAYS
    ],
)
def test_conversation_is_the_same(
    path: Path, style: str, played: Mapping[Path, Future[tuple[Any, Results]]]
) -> None:
    case, results = played[path].result()
    listed = load_expected()
    expected = listed.get(path.stem, {}) | listed.get(f"{path.stem} ({style})", {})
    if case.reference_broken:
        said = [message for messages in results[style] for message in messages]
        assert qmpdiff.CLOSED not in said, "qmpd ended in the middle of the conversation"
        assert qmpdiff.TIMEOUT not in said, "qmpd fell silent"
        assert not expected, "a broken reference is not compared: nothing may be listed"
        return
    differing = {found[0]: found for found in qmpdiff.differing_steps(case, results["QEMU"], results[style])}
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        for number in sorted(differing.keys() - expected.keys()):
            qmpdiff.print_diff(*differing[number])
    assert not report.getvalue(), f"-QEMU +qmpd\n{report.getvalue()}"
    assert not expected.keys() - differing.keys(), (
        "these steps do not differ any more; take them off expected.json: "
        f"{sorted(expected.keys() - differing.keys())}"
    )


def test_expected_differences_belong_to_cases() -> None:
    steps = {}
    for path, style, _ in PLAYS:
        number = len(json.loads(path.read_text(encoding="utf-8"))["steps"])
        steps[path.stem] = steps[f"{path.stem} ({style})"] = number
    for case, listed in load_expected().items():
        assert case in steps, f"{case} is no case"
        assert max(listed) <= steps[case], f"{case} has only {steps[case]} steps"
        assert all(listed.values()), f"{case}: a step is listed without a reason"


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in CASE_FILES])
def test_case_file_is_well_formed(path: Path) -> None:
    case = qmpdiff.Case.load(path)
    assert case.description
    assert case.name.startswith(case.persona + "-")
