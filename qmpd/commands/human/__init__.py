"""The text monitor's commands, for `human-monitor-command`.

`line` reads a line, `actions` and `info` are the tables of commands and say what
each does (mostly: execute a QMP command, see `qmp`), `printed` writes what that
returns as people read it, and `execute` holds them together.  A text command is
there if its QMP command is, so a storage daemon has no `stop`.

Replies have CR LF line ends.  No line is ever logged: a secret may be in it.
"""

from __future__ import annotations

from qmpd.commands.human.execute import execute

__all__ = ["execute"]
