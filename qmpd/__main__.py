"""``python -m qmpd``: the same as the program ``qmpd``."""

from __future__ import annotations

import sys

from qmpd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
