"""What tests of backups of LUKS headers do with a disk over QMP, whichever version its header has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from daemons import Connection

PREFIX: Final = "__org.qmpd_"


class HeaderDisk:
    """A disk whose node is called "disk".

    :param directory: gets the backups.
    """

    def __init__(self, directory: Path, daemon: Connection) -> None:
        self.directory = directory
        self.daemon = daemon

    def close(self) -> None:
        self.daemon.execute("blockdev-del", {"node-name": "disk"})

    def job(self, command: str, **arguments: Any) -> str | None:
        """Run a job to its end and return its error."""
        daemon = self.daemon
        daemon.execute(command, {"job-id": "job", "node-name": "disk", **arguments})
        daemon.wait_event("JOB_STATUS_CHANGE", id="job", status="concluded")
        (info,) = daemon.execute("query-jobs")
        daemon.execute("job-dismiss", {"id": "job"})
        error: str | None = info.get("error")
        return error

    def backup(self, name: str = "backup") -> Path:
        path = self.directory / name
        assert self.job(f"{PREFIX}luks-header-backup", filename=str(path)) is None
        return path

    def restore(self, path: Path | None, **more: Any) -> str | None:
        named = {} if path is None else {"filename": str(path)}
        return self.job(f"{PREFIX}luks-header-restore", **named, **more)
