"""What tests/reaper.py promises: nothing is left behind, and the command's exit status is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from daemons import CHECKOUT, PATIENCE

REAPER: Final = (sys.executable, str(CHECKOUT / "tests" / "reaper.py"))

#: A command that leaves a process of its own session behind, as a daemon does, and says its number.
LEAVES: Final = (
    "setsid sh -c 'trap \"\" TERM; echo $$ >daemon; exec sleep 1000' & until [ -s daemon ]; do :; done"
)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    ended = subprocess.run([*REAPER, "sh", "-c", f"{LEAVES}; exit 3"], cwd=tmp_path, check=False)
    assert ended.returncode == 3
    assert not is_there(int((tmp_path / "daemon").read_text()))


def test_who_is_told_to_end_ends_them_all(tmp_path: Path) -> None:
    reaper = subprocess.Popen([*REAPER, "sh", "-c", f"{LEAVES}; sleep 1000"], cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "daemon").exists() or not (tmp_path / "daemon").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reaper.send_signal(signal.SIGTERM)
    assert reaper.wait(PATIENCE) == 128 + signal.SIGTERM
    assert not is_there(int((tmp_path / "daemon").read_text()))
