"""Commands of `schema/emulator.json`: what an emulator tells about itself and its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpd.commands.parts import Handler

HANDLERS: Final[Mapping[str, Handler]] = {}
