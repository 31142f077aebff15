"""What all tests share: the peers' rule, and daemons that end with the test."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final

import hypothesis
import peers
import pytest
from daemons import QMPD, STORAGE_DAEMON, RunningDaemon

StartDaemon = Callable[..., RunningDaemon]

#: Files that take long, the longest first.  Where several processes share the files (.ci/run) these are begun
#: with: none is left for the end, when the other processes have nothing more to do.
LONGEST: Final = (
    "conformance/test_conformance.py",
    "libvirt/test_libvirt.py",
    "interop/test_keyslots.py",
    "interop/test_amend_answers.py",
    "stress/test_disks_under_load.py",
    "faults/test_keyslots_killed.py",
    "readme/test_readme.py",
    "interop/test_lock_matrix.py",
    "bench/test_data_path.py",
    "bench/test_unlock.py",
    "cli/test_like_qemu_storage_daemon.py",
)

# How long an example takes says more about the machine than about us.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests' own subprocesses find cryptsetup where Debian puts it."""
    os.environ["PATH"] = peers.search_path()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long in front; the others stay in their order."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test whose peers are not there, by their names."""
    reasons = [
        reason
        for marker in item.iter_markers("peer")
        for name in marker.args
        if (reason := peers.missing(name)) is not None
    ]
    if reasons:
        stop = pytest.fail if peers.required() else pytest.skip
        stop("missing peer: " + ", ".join(dict.fromkeys(reasons)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where the peers are required nothing may be skipped, for whatever reason."""
    report = yield
    if report.skipped and peers.required() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and QMPD_REQUIRE_PEERS allows none: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the missing peers at the end of every run."""
    terminalreporter.ensure_newline()
    terminalreporter.write_line(peers.summary())


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start qmpd: ``start_daemon(*arguments, name="daemon", program=QMPD)``; all end with the test."""
    started: list[RunningDaemon] = []

    def start(*arguments: str, name: str = "daemon", program: tuple[str, ...] = QMPD) -> RunningDaemon:
        started.append(RunningDaemon(program, arguments, tmp_path, name))
        return started[-1]

    yield start
    for daemon in started:
        daemon.kill()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> RunningDaemon:
    """A qmpd with nothing in it but a monitor."""
    return start_daemon()


@pytest.fixture
def start_storage_daemon(start_daemon: StartDaemon) -> StartDaemon:
    """Start qemu-storage-daemon, as ``start_daemon`` starts qmpd."""

    def start(*arguments: str, name: str = "peer") -> RunningDaemon:
        return start_daemon(*arguments, name=name, program=STORAGE_DAEMON)

    return start
