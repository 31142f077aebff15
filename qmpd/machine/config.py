"""What a command line says about the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MachineConfig:
    """A machine as the command line describes it.

    :param type: its type, such as ``pc`` or ``pc-q35-10.0``; an alias or the full name.
    :param name: what people call it (``-name guest=``); None if it has no name.
    :param uuid: as text; None if it was given none.
    :param memory: bytes; None for as many as machines of its type have.
    :param cpus: how many processors it has on paper.
    :param started: it runs from the start on (no ``-S``).
    :param no_shutdown: the process lives on when the machine is switched off (``-no-shutdown``).
    :param no_reboot: a reset switches it off (``-no-reboot``).
    """

    type: str = "pc"
    name: str | None = None
    uuid: str | None = None
    memory: int | None = None
    cpus: int = 1
    started: bool = True
    no_shutdown: bool = False
    no_reboot: bool = False
