"""Commands of `schema/job.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def query_jobs(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs, newest first."""
    return parts.jobs.query()


def job_cancel(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Give a job up."""
    parts.jobs.cancel(arguments["id"])
    return {}


def job_complete(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tell a job that is ready to come to its end."""
    parts.jobs.complete(arguments["id"])
    return {}


def job_dismiss(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Forget a concluded job."""
    parts.jobs.dismiss(arguments["id"])
    return {}


def job_finalize(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Let a pending job conclude."""
    parts.jobs.finalize(arguments["id"])
    return {}


def job_pause(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stop a job for a while."""
    parts.jobs.pause(arguments["id"])
    return {}


def job_resume(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Let a paused job go on."""
    parts.jobs.resume(arguments["id"])
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "query-jobs": query_jobs,
    "job-cancel": job_cancel,
    "job-complete": job_complete,
    "job-dismiss": job_dismiss,
    "job-finalize": job_finalize,
    "job-pause": job_pause,
    "job-resume": job_resume,
}
