"""The errors that a client is told about.

Every room raises these, so they stand below all of them.  An :class:`Error`
is a refusal with a text meant for the person at the other end; whatever else
is raised is a fault of ours.  The QMP error classes are those of the QMP
specification, section "Error"; new conditions use GenericError.  What may be
logged of the faults is here too, :func:`trace`.
"""

from __future__ import annotations

import traceback


class Error(Exception):
    """A refusal: what was wrong, with which value, and what would be right.

    :param desc: the text that the client is shown, without a final full stop
        unless QEMU's own wording has one.
    :param hint: a line for people, which stands below the text at a terminal and never goes on the wire.
    """

    #: The QMP error class that goes on the wire.
    error_class = "GenericError"

    def __init__(self, desc: str, hint: str = "") -> None:
        super().__init__(desc)
        self.desc = desc
        self.hint = hint

    @property
    def lines(self) -> list[str]:
        """What people at a terminal are shown."""
        return [self.desc, *self.hint.splitlines()]


class CommandNotFound(Error):
    """The command does not exist, or not in the session's present state."""

    error_class = "CommandNotFound"


class DeviceNotFound(Error):
    """A device, an object path or a QOM class is not there."""

    error_class = "DeviceNotFound"


class DeviceNotActive(Error):
    """A block job that is not (or no longer) running, or a device that nothing can be asked of."""

    error_class = "DeviceNotActive"


def trace(error: BaseException) -> str:
    """Where an exception came from, with those that led to it, but without their texts.

    For the log: the text of an error that nobody expected may quote a secret.
    """
    lines: list[str] = []
    while True:
        lines = [*traceback.format_tb(error.__traceback__), f"{type(error).__qualname__}\n", *lines]
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return "Traceback (most recent call last):\n" + "".join(lines)
        error = cause
        lines.insert(0, "led to:\n")
