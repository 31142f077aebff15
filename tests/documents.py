"""Commands that a document shows, run as a reader would type them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from daemons import CHECKOUT


def typed(commands: str, printed: Path, environment: Mapping[str, str]) -> str:
    """Type commands into a shell in the checkout, and return what they print.

    None may fail, and no command of the monitor be refused.

    :param printed: a file for what they print.
    """
    with printed.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(100)
        finally:
            try:
                os.killpg(shell.pid, signal.SIGKILL)  # what was started in the background
            except ProcessLookupError:
                pass
    shown = printed.read_text()
    check(status, shown)
    return shown


def check(status: int, shown: str) -> None:
    """Fail if a shell ended with *status* or printed *shown* because something went wrong."""
    assert status == 0, shown
    assert '"error"' not in shown, shown
    assert "Traceback" not in shown, shown


def assert_in_order(shown: str, expected: Iterable[str]) -> None:
    """Fail unless these texts are in what was shown, none before the one in front of it."""
    position = 0
    for text in expected:
        found = shown.find(text, position)
        assert found >= 0, f"{text!r} is not there, or not in this place:\n{shown}"
        position = found
