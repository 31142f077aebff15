"""Commands about what an emulator without a processor and a guest has not.

The answers are in `qmpd.machine.absent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.errors import Error
from qmpd.machine.absent import ANSWERS, REFUSALS


def _answer(value: Any) -> Handler:
    def answer(parts: Parts, arguments: dict[str, Any]) -> Any:
        return value

    return answer


def _refusal(error_class: type[Error], text: str) -> Handler:
    def refuse(parts: Parts, arguments: dict[str, Any]) -> None:
        raise error_class(text)

    return refuse


HANDLERS: Final[Mapping[str, Handler]] = {
    **{name: _answer(value) for name, value in ANSWERS.items()},
    **{name: _refusal(*refusal) for name, refusal in REFUSALS.items()},
}
