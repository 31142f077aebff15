"""Jobs: long work that a command starts and other commands look after.

A job has a state.  Two tables say everything about it: which state may follow
which, and which verb a client may use in which state.  Every change of state
is an event.

    created --> running <--> paused           job-pause, job-resume
                 |  |
                 |  +------> ready <--> standby
                 v             |
              waiting <--------+              job-complete
                 |
                 v
              pending                         job-finalize, unless auto-finalize
                 |
                 v
             concluded --> null               job-dismiss, unless auto-dismiss

and from any state before "concluded" a failure or `job-cancel` leads to
"aborting", then "concluded".

The work itself is a coroutine function that is given its :class:`Job`.  It
tells of its progress, may call :meth:`Job.pause_point` where it can stop for
a while, and raises :class:`qmpd.errors.Error` or OSError to fail; the text is
then in `query-jobs`.  It is cancelled as any asyncio task is: at its next
``await``.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from qmpd.errors import Error, trace
from qmpd.qapi.settings import is_identifier

_LOG: Final = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]

#: The work of a job.
Body = Callable[["Job"], Awaitable[None]]

_CANCELLED: Final = "Operation canceled"


class State(enum.StrEnum):
    """Where a job is in its life; the values are QAPI's JobStatus."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(enum.StrEnum):
    """What a client may do with a job; the values are QAPI's JobVerb."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


#: Which states may follow a state.
NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.UNDEFINED: frozenset({State.CREATED}),
    State.CREATED: frozenset({State.RUNNING, State.ABORTING, State.NULL}),
    State.RUNNING: frozenset({State.PAUSED, State.READY, State.WAITING, State.ABORTING}),
    State.PAUSED: frozenset({State.RUNNING}),
    State.READY: frozenset({State.STANDBY, State.WAITING, State.ABORTING}),
    State.STANDBY: frozenset({State.READY}),
    State.WAITING: frozenset({State.PENDING, State.ABORTING}),
    State.PENDING: frozenset({State.ABORTING, State.CONCLUDED}),
    State.ABORTING: frozenset({State.CONCLUDED}),
    State.CONCLUDED: frozenset({State.NULL}),
    State.NULL: frozenset(),
}

_AT_WORK: Final = frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.READY, State.STANDBY})

#: In which states a client may use a verb.
ALLOWED: Final[Mapping[Verb, frozenset[State]]] = {
    Verb.CANCEL: _AT_WORK | {State.WAITING, State.PENDING},
    Verb.PAUSE: _AT_WORK,
    Verb.RESUME: _AT_WORK,
    Verb.SET_SPEED: _AT_WORK,
    Verb.COMPLETE: frozenset({State.READY, State.STANDBY}),
    Verb.FINALIZE: frozenset({State.PENDING}),
    Verb.DISMISS: frozenset({State.CONCLUDED}),
}

#: The state of a pause by the state that it interrupts.
_PAUSE_OF: Final[Mapping[State, State]] = {State.RUNNING: State.PAUSED, State.READY: State.STANDBY}
_RESUMED_FROM: Final[Mapping[State, State]] = {paused: state for state, paused in _PAUSE_OF.items()}


class Job:
    """One job.

    :param job_id: its id.
    :param type_: what it does (QAPI's JobType).
    :param emit: sends an event to clients.
    :param auto_finalize: goes on from "pending" by itself.
    :param auto_dismiss: is forgotten as soon as it is concluded.
    """

    def __init__(
        self,
        job_id: str,
        type_: str,
        emit: Emit,
        *,
        auto_finalize: bool = True,
        auto_dismiss: bool = False,
    ) -> None:
        self.id = job_id
        self.type = type_
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.state = State.UNDEFINED
        #: Why it failed, or None.
        self.error: str | None = None
        self.current_progress = 0
        self.total_progress = 1
        #: Set by `job-complete`: a job that is ready shall come to its end.
        self.completion = asyncio.Event()
        self.cancelled = False
        #: A client has asked for a pause and not taken it back.
        self.pause_requested = False
        self._emit = emit
        self._counts_itself = False
        self._started = False
        self._committed = False
        #: What is done when it is forgotten.
        self.farewell: Callable[[], None] = lambda: None
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id!r} {self.state}>"

    def info(self) -> dict[str, Any]:
        """What `query-jobs` says (JobInfo)."""
        info = {
            "current-progress": self.current_progress,
            "status": str(self.state),
            "total-progress": self.total_progress,
            "type": self.type,
            "id": self.id,
        }
        return info if self.error is None else info | {"error": self.error}

    # -- for the work

    def report_progress(self, current: int, total: int) -> None:
        """Say how much is done, in any unit.  Without this a job counts 1 of 1 when it ends."""
        self._counts_itself = True
        self.current_progress, self.total_progress = current, total

    async def pause_point(self) -> None:
        """Stop here for as long as a client wants the job to pause."""
        if not self.pause_requested:
            return
        if self.state in _PAUSE_OF:
            self.enter(_PAUSE_OF[self.state])
        await self._may_run.wait()

    def commit(self) -> None:
        """What follows can't be taken back: from here on the job comes to its end, whoever cancels it."""
        self._committed = True

    def become_ready(self) -> None:
        """All is done that can be; wait for `completion`, or go on with what is new until it is set."""
        self.enter(State.READY)

    # -- its life

    def enter(self, state: State) -> None:
        """Go into another state, and tell clients."""
        assert state in NEXT[self.state], f"a job goes from {self.state} to {state}"
        self.state = state
        self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": str(state)})
        if state is State.NULL:
            self.farewell()

    def start(self, body: Body, check: Callable[[], None] | None = None) -> None:
        """Begin with the work, once the present command has been answered.

        :raise Error: what `check` raises.
        """
        self.enter(State.CREATED)
        if check is not None:
            try:
                check()
            except BaseException:
                self.enter(State.NULL)
                raise
        self.enter(State.RUNNING)
        self._task = asyncio.get_running_loop().create_task(self._run(body), name=f"job {self.id}")

    async def _run(self, body: Body) -> None:
        self._started = True
        try:
            if not self.cancelled:
                await body(self)
        except asyncio.CancelledError:
            self.cancelled = True
        except Error as error:
            self.error = error.desc
        except OSError as error:
            self.error = error.strerror or str(error)
        except Exception as error:
            # A fault of ours.  Its text may hold anything, a secret too.
            _LOG.error("job %s failed unexpectedly\n%s", self.id, trace(error))
            self.error = "Internal error"
        if not self._counts_itself:
            self.current_progress = self.total_progress
        if self.state in _RESUMED_FROM:
            self.enter(_RESUMED_FROM[self.state])
        if self.cancelled or self.error is not None:
            self.abort()
            return
        self.enter(State.WAITING)
        self.enter(State.PENDING)
        if self.auto_finalize:
            self.conclude()

    def abort(self) -> None:
        """End without success."""
        if self.error is None:
            self.error = _CANCELLED
        self.enter(State.ABORTING)
        self.conclude()

    def conclude(self) -> None:
        """End; with `auto_dismiss`, be forgotten too."""
        self.enter(State.CONCLUDED)
        if self.auto_dismiss:
            self.enter(State.NULL)

    # -- for the verbs

    def pause(self) -> None:
        """Ask the work to stop at its next pause point."""
        self.pause_requested = True
        self._may_run.clear()

    def resume(self) -> None:
        """Let it go on."""
        self.pause_requested = False
        self._may_run.set()
        if self.state in _RESUMED_FROM:
            self.enter(_RESUMED_FROM[self.state])

    def cancel(self) -> None:
        """Stop the work at its next ``await``, or give up what is pending."""
        if self.cancelled or (self._committed and self.state not in (State.WAITING, State.PENDING)):
            # Once is enough; twice would disturb the work's cleaning up.
            return
        self.cancelled = True
        if self.state in (State.WAITING, State.PENDING):
            self.abort()
            return
        if self.pause_requested:
            self.resume()
        if self._started:
            # A task that is cancelled before its first step would not take any.
            assert self._task is not None, "a job that is at work has a task"
            self._task.cancel()

    async def wait(self) -> None:
        """Wait until the work is over."""
        if self._task is not None:
            await asyncio.wait([self._task])


class Jobs:
    """All jobs of a daemon.

    :param emit: sends an event to clients.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        #: By id, oldest first.  A job in the state "null" is gone, whenever it is taken out.
        self._by_id: dict[str, Job] = {}

    def start(
        self,
        job_id: str,
        type_: str,
        body: Body,
        *,
        auto_finalize: bool = True,
        auto_dismiss: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Job:
        """Make a job and begin with its work.

        :param check: raises Error if the work can't begin; then the job is gone at once.
        :raise Error: if the id is not well-formed or not free, or what `check` raises.
        """
        if not is_identifier(job_id):
            raise Error(f"Invalid job ID '{job_id}'")
        if self._find(job_id) is not None:
            raise Error(f"Job ID '{job_id}' already in use")
        job = Job(job_id, type_, self._emit, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self._by_id.pop(job_id, None)
        self._by_id[job_id] = job
        job.start(body, check)
        return job

    def all(self) -> list[Job]:
        """The jobs, newest first."""
        self._by_id = {job_id: job for job_id, job in self._by_id.items() if job.state is not State.NULL}
        return list(reversed(self._by_id.values()))

    def query(self) -> list[dict[str, Any]]:
        """What `query-jobs` says."""
        return [job.info() for job in self.all()]

    def _find(self, job_id: str) -> Job | None:
        job = self._by_id.get(job_id)
        return None if job is None or job.state is State.NULL else job

    def get(self, job_id: str) -> Job:
        """The job with this id.

        :raise Error: if there is none.
        """
        job = self._find(job_id)
        if job is None:
            raise Error("Job not found")
        return job

    def _get_for(self, job_id: str, verb: Verb) -> Job:
        job = self.get(job_id)
        if job.state not in ALLOWED[verb]:
            raise Error(f"Job '{job_id}' in state '{job.state}' cannot accept command verb '{verb}'")
        return job

    # -- the verbs

    def cancel(self, job_id: str) -> None:
        """Give a job up.

        :raise Error: if there is no such job, or it is too late; so for all verbs.
        """
        self._get_for(job_id, Verb.CANCEL).cancel()

    def pause(self, job_id: str) -> None:
        """Stop a job for a while."""
        job = self._get_for(job_id, Verb.PAUSE)
        if job.pause_requested:
            raise Error("Job is already paused")
        job.pause()

    def resume(self, job_id: str) -> None:
        """Let a paused job go on."""
        if not self.get(job_id).pause_requested:
            raise Error("Can't resume a job that was not paused")
        self._get_for(job_id, Verb.RESUME).resume()

    def complete(self, job_id: str) -> None:
        """Tell a job that is ready to come to its end."""
        self._get_for(job_id, Verb.COMPLETE).completion.set()

    def finalize(self, job_id: str) -> None:
        """Let a pending job conclude."""
        self._get_for(job_id, Verb.FINALIZE).conclude()

    def dismiss(self, job_id: str) -> None:
        """Forget a concluded job."""
        self._get_for(job_id, Verb.DISMISS).enter(State.NULL)
        del self._by_id[job_id]

    async def close(self) -> None:
        """Cancel all jobs, wait for their end, and forget them, as `quit` does."""
        for job in self.all():
            if job.state in ALLOWED[Verb.CANCEL]:
                job.cancel()
        for job in self.all():
            await job.wait()
        for job in self.all():
            if job.state is State.CONCLUDED:
                self.dismiss(job.id)
