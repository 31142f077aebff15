"""Every command that the README shows is run here, section by section, as a reader would type it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import ordinary_user
import peers
import pytest
from daemons import CHECKOUT
from documents import check, typed

README: Final = (CHECKOUT / "README.md").read_text()

#: Commands that run in another form here, and why.
STANDS_IN_FOR: Final[Mapping[str, tuple[str, str]]] = {
    "make test": ("make --dry-run test", "this very test is part of it"),
    "make bench": (
        "make bench BENCH_ARGUMENTS="
        "'--quick --only monitor data-path --chain raw --load nbdcopy --plot /dev/null'",
        "the numbers are not wanted here, and take half an hour; the other suites have tests of their own",
    ),
}

#: Languages of fenced blocks that are shown and not typed.
SHOWN: Final = frozenset({"text", "json"})


def sections() -> dict[str, list[tuple[str, str]]]:
    """Return the README's fenced blocks as (language, text), by the heading above them."""
    found: dict[str, list[tuple[str, str]]] = {}
    heading, language, lines = "", None, []
    for line in README.splitlines():
        if language is not None:
            if line == "```":
                found.setdefault(heading, []).append((language, "\n".join(lines)))
                language, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            language = line.removeprefix("```")
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert language is None, "a block of the README does not end"
    return found


def script(heading: str) -> str:
    """Return the commands under *heading*, with the stand-ins in place."""
    typed = "\n".join(text for language, text in sections()[heading] if language == "sh")
    for command, (stand_in, _) in STANDS_IN_FOR.items():
        typed = re.sub(rf"^{re.escape(command)}$", stand_in, typed, flags=re.MULTILINE)
    return typed


#: The section whose commands are for an ordinary user.
LIBVIRT: Final = "libvirt"

HEADINGS: Final = [
    heading
    for heading, blocks in sections().items()
    if heading != LIBVIRT and any(language == "sh" for language, _ in blocks)
]


def test_every_block_is_either_run_or_plainly_not_a_command() -> None:
    languages = {language for blocks in sections().values() for language, _ in blocks}
    assert languages <= {"sh"} | SHOWN
    assert "make demo\nmake test" in script("qmpd").replace("make --dry-run test", "make test")


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_commands_of_a_section_work(heading: str, tmp_path: Path) -> None:
    commands = script(heading)
    for peer in peers.PEERS:
        # As a command of the shell: qemu-io is also a command inside the monitor.
        used = re.search(rf"(?:^|[|;(&])\s*{re.escape(peer)}\b", commands, re.MULTILINE)
        if used and (reason := peers.missing(peer)):
            (pytest.fail if peers.required() else pytest.skip)(f"missing peer: {reason}")
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    for inherited in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # this may run under `make test`
        environment.pop(inherited, None)
    typed(commands, tmp_path / "printed", environment)


@pytest.mark.peer(*ordinary_user.LIBVIRT)
def test_the_commands_for_users_of_libvirt_work() -> None:
    with ordinary_user.installed_emulator() as emulator, ordinary_user.home() as home:
        commands = script(LIBVIRT)
        assert ordinary_user.EMULATOR in commands
        commands = commands.replace(ordinary_user.EMULATOR, str(emulator))
        status, printed = ordinary_user.run(["bash", "-euo", "pipefail", "-c", commands], home, 100)
    check(status, printed)
    assert "/disk.raw" in printed
    assert "Disk detached successfully" in printed


def test_the_demo_shows_what_the_readme_says() -> None:
    """Line by line, where three dots stand for any lines and every run has its own directory."""
    (excerpt,) = [text for language, text in sections()["qmpd"] if language == "text"]
    demo = subprocess.run(
        [sys.executable, "-m", "qmpd", "demo"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = re.sub(r"/\S*?/qmpd-demo-\w+", "/tmp/qmpd-demo", demo.stdout)
    position = 0
    for part in excerpt.split("...\n"):
        found = shown.find(part, position)
        assert found >= 0, f"not in the demo's output, or not in this place:\n{part}"
        position = found + len(part)
