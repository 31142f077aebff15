"""Every command of docs/libvirt.md works as it is shown there, and prints what is shown."""

from __future__ import annotations

import re
from typing import Final

import ordinary_user
import pytest
from daemons import CHECKOUT
from documents import check

PAGE: Final = (CHECKOUT / "docs" / "libvirt.md").read_text()

#: Printed between one block's commands and the next one's.
BOUNDARY: Final = "-- the next block --"

BLOCKS: Final[list[tuple[str, str]]] = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def shown_as(text: str) -> re.Pattern[str]:
    """Return what matches a shown output, in which three dots stand for anything."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return re.compile(".*?".join(map(re.escape, "\n".join(lines).split("..."))), re.DOTALL)


@pytest.mark.timeout(200)
@pytest.mark.peer(*ordinary_user.LIBVIRT, "cryptsetup", "nbdinfo", "nbdcopy")
def test_the_commands_of_the_page_about_libvirt_print_what_it_shows() -> None:
    commands = [text for language, text in BLOCKS if language == "sh"]
    assert ordinary_user.EMULATOR in commands[0]
    with ordinary_user.installed_emulator() as emulator, ordinary_user.home() as home:
        typed = f"\necho {BOUNDARY!r}\n".join(commands).replace(ordinary_user.EMULATOR, str(emulator))
        status, printed = ordinary_user.run(["bash", "-euo", "pipefail", "-c", typed], home, 150)
    check(status, printed)
    outputs = ["\n".join(map(str.rstrip, part.strip().splitlines())) for part in printed.split(BOUNDARY)]
    assert len(outputs) == len(commands)
    asked = 0
    for number, (language, text) in enumerate(BLOCKS):
        if language == "sh":
            asked += 1
        else:
            assert (language, BLOCKS[number - 1][0]) == ("text", "sh"), "an output stands below its commands"
            output = re.sub(r"\n(?=\n)", "", outputs[asked - 1])
            pattern = shown_as(re.sub(r"\n(?=\n)", "", text))
            assert pattern.fullmatch(output), f"shown:\n{text}\nprinted:\n{output}"
