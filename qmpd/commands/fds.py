"""Commands of `schema/fds.json`: descriptors that clients pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpd.commands.parts import Handler

HANDLERS: Final[Mapping[str, Handler]] = {}
