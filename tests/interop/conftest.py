"""Which of these tests can be run here at all."""

from __future__ import annotations

import loop_devices
import pytest

#: What a kernel or a sandbox may not have, unlike a program, is nothing that could be installed.
collect_ignore = [] if loop_devices.available() else ["test_host_device.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if collect_ignore:
        terminalreporter.write_line("not tested for want of loop devices: " + ", ".join(collect_ignore))
