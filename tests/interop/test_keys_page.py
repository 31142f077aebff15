"""Every command of docs/keys.md works as it is shown there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

import pytest
from daemons import CHECKOUT
from documents import assert_in_order, typed

PAGE: Final = (CHECKOUT / "docs" / "keys.md").read_text()


@pytest.mark.peer("cryptsetup", "socat")
def test_the_commands_of_the_page_about_keys_work(tmp_path: Path) -> None:
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    # The checkout that this test is part of, wherever the environment is.
    commands = commands.replace('"$PWD/.venv/bin:$PATH"', f'"{Path(sys.executable).parent}:$PATH"')
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    shown = typed(commands, tmp_path / "printed", environment)
    expected = (
        '"weak": true',
        "-r--------",
        "Hash spec:",
        "it opens the disk",
        '"state": "damaged"',
        "it opens again",
        "saved without a backup",
        "the colleague has gone",
        "and is back",
        "restored by cryptsetup",
        '"type": "argon2id"',
        '"damaged": ["There is no primary LUKS2 header"]',
        "Epoch:",
        "LUKS2 opens again",
        "it is LUKS2 now",
        "and LUKS1 again",
    )
    assert_in_order(shown, expected)
