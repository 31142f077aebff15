"""An unmodified libvirt drives the emulator, as it drives QEMU's: the same script with both."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import ordinary_user
import peers
import pytest
from daemons import CHECKOUT

ACCEPTANCE: Final = CHECKOUT / "tests" / "libvirt" / "acceptance.sh"

#: Seconds; it takes about thirty on a machine that does nothing else.
TIME: Final = 400

pytestmark = [pytest.mark.peer(*ordinary_user.LIBVIRT, "qemu-img"), pytest.mark.timeout(TIME + 30)]


@pytest.fixture(scope="module")
def emulator() -> Iterator[Path]:
    with ordinary_user.installed_emulator() as path:
        yield path


def accept(emulator: Path, *parts: str) -> tuple[int, str]:
    """Let the script try an emulator; returns its exit status, and what it printed."""
    with ordinary_user.home() as home:
        # The checkout may be closed to the user.
        script = shutil.copy(ACCEPTANCE, home)
        return ordinary_user.run(["bash", script, str(emulator), *parts], home, TIME)


def passed(status: int, printed: str) -> int:
    """Return how many checks the script has made, all of which must have passed."""
    failed = re.findall(r"^not ok .*\n(?:#.*\n)*", printed, re.MULTILINE)
    assert failed == [], "\n".join(failed)
    assert status == 0, printed
    checks = re.findall(r"^ok (\d+) - ", printed, re.MULTILINE)
    assert [int(number) for number in checks] == list(range(1, len(checks) + 1))
    assert f"\n1..{len(checks)}\n" in printed
    return len(checks)


def test_libvirt_drives_the_emulator(emulator: Path) -> None:
    status, printed = accept(emulator)
    assert passed(status, printed) > 200
    assert "is qmpd\n" in printed
    assert "SKIP" not in printed


@pytest.mark.peer("qemu-system-x86_64")
def test_what_is_expected_of_the_emulator_is_what_qemu_does() -> None:
    status, printed = accept(peers.path_of("qemu-system-x86_64"))
    assert passed(status, printed) > 200
    assert "is QEMU\n" in printed


def test_the_script_fails_with_what_is_no_emulator() -> None:
    status, printed = accept(Path("/bin/false"))
    assert status == 1
    assert re.search(r"^not ok \d+ - a domain is defined$", printed, re.MULTILINE)
    assert "\nBail out!" in printed
