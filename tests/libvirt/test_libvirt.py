"""An unmodified libvirt drives the emulator, as it drives QEMU's: the same script with both."""

from __future__ import annotations

import re
import shutil
import subprocess
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


def accept(emulator: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    """Let the script try an emulator."""
    with ordinary_user.home() as home:
        # The checkout may be closed to the user.
        script = Path(shutil.copy(ACCEPTANCE, home))
        script.chmod(0o755)
        process = subprocess.Popen(
            ordinary_user.command("bash", str(script), str(emulator), *parts),
            cwd=home,
            env=ordinary_user.environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, _ = process.communicate(timeout=TIME)
        except BaseException:
            process.terminate()
            print(process.communicate()[0])
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def passed(result: subprocess.CompletedProcess[str]) -> int:
    """Return how many checks the script has made, all of which must have passed."""
    failed = re.findall(r"^not ok .*\n(?:#.*\n)*", result.stdout, re.MULTILINE)
    assert failed == [], "\n".join(failed)
    assert result.returncode == 0, result.stdout
    checks = re.findall(r"^ok (\d+) - ", result.stdout, re.MULTILINE)
    assert [int(number) for number in checks] == list(range(1, len(checks) + 1))
    assert f"\n1..{len(checks)}\n" in result.stdout
    return len(checks)


def test_libvirt_drives_the_emulator(emulator: Path) -> None:
    result = accept(emulator)
    assert passed(result) > 200
    assert "is qmpd\n" in result.stdout
    assert "SKIP" not in result.stdout


@pytest.mark.peer("qemu-system-x86_64")
def test_what_is_expected_of_the_emulator_is_what_qemu_does() -> None:
    result = accept(peers.path_of("qemu-system-x86_64"))
    assert passed(result) > 200
    assert "is QEMU\n" in result.stdout


def test_the_script_fails_with_what_is_no_emulator(tmp_path: Path) -> None:
    result = accept(Path("/bin/false"))
    assert result.returncode == 1
    assert re.search(r"^not ok \d+ - a domain is defined$", result.stdout, re.MULTILINE)
    assert "\nBail out!" in result.stdout
