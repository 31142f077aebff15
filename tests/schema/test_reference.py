"""The reference page is what the schema's comments say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent


def test_reference_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "docs" / "make_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
