from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpd.errors import Error
from qmpd.jobs import ALLOWED, NEXT, Job, Jobs, State, Verb


class Watch:
    """Jobs, and the states that they have told of."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.jobs = Jobs(self._emit)

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        assert name == "JOB_STATUS_CHANGE"
        self.seen.append(data["status"])


@pytest.fixture
def watch() -> Watch:
    return Watch()


async def nothing(job: Job) -> None:
    await asyncio.sleep(0)


async def forever(job: Job) -> None:
    while True:
        await job.pause_point()
        await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_job_begins_before_the_reply_and_ends_after_it(watch: Watch) -> None:
    job = watch.jobs.start("j", "create", nothing)
    assert watch.seen == ["created", "running"]
    await job.wait()
    assert watch.seen == ["created", "running", "waiting", "pending", "concluded"]
    assert watch.jobs.query() == [
        {"current-progress": 1, "status": "concluded", "total-progress": 1, "type": "create", "id": "j"}
    ]


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (Error("no good"), "no good"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("secret bytes"), "Internal error"),
    ],
)
async def test_a_failed_job_says_why(
    watch: Watch, failure: Exception, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(job: Job) -> None:
        raise failure

    await watch.jobs.start("j", "create", fail).wait()
    assert "secret bytes" not in caplog.text
    assert ("job j failed unexpectedly\nTraceback" in caplog.text) == (text == "Internal error")
    assert watch.seen == ["created", "running", "aborting", "concluded"]
    [info] = watch.jobs.query()
    assert info["error"] == text
    assert info["current-progress"] == 1


async def test_a_job_that_has_no_chance_never_runs_and_leaves_its_id_free(watch: Watch) -> None:
    def refuse() -> None:
        raise Error("somebody is in the way")

    with pytest.raises(Error, match="^somebody is in the way$"):
        watch.jobs.start("j", "amend", nothing, check=refuse)
    assert watch.seen == ["created", "null"]
    assert watch.jobs.query() == []
    await watch.jobs.start("j", "amend", nothing).wait()


@pytest.mark.parametrize("job_id", ["", "1j", "j j", "é"])
async def test_job_ids_are_identifiers(watch: Watch, job_id: str) -> None:
    with pytest.raises(Error) as error:
        watch.jobs.start(job_id, "create", nothing)
    assert error.value.desc == f"Invalid job ID '{job_id}'"
    assert watch.seen == []


async def test_an_id_is_in_use_until_its_job_is_dismissed(watch: Watch) -> None:
    await watch.jobs.start("j", "create", nothing).wait()
    with pytest.raises(Error, match="^Job ID 'j' already in use$"):
        watch.jobs.start("j", "create", nothing)
    watch.jobs.dismiss("j")
    assert watch.seen[-1] == "null"
    assert watch.jobs.query() == []
    await watch.jobs.start("j", "create", nothing).wait()


async def test_jobs_are_listed_newest_first(watch: Watch) -> None:
    for name in ("a", "b", "c"):
        await watch.jobs.start(name, "create", nothing).wait()
    assert [each["id"] for each in watch.jobs.query()] == ["c", "b", "a"]


@pytest.mark.parametrize("verb", ["cancel", "complete", "dismiss", "finalize", "pause", "resume"])
def test_no_verb_finds_a_job_that_is_not_there(watch: Watch, verb: str) -> None:
    with pytest.raises(Error, match="^Job not found$"):
        getattr(watch.jobs, verb)("nope")


@pytest.mark.parametrize("verb", ["cancel", "complete", "finalize", "pause"])
async def test_a_concluded_job_can_only_be_dismissed(watch: Watch, verb: str) -> None:
    await watch.jobs.start("j", "create", nothing).wait()
    with pytest.raises(Error) as error:
        getattr(watch.jobs, verb)("j")
    assert error.value.desc == f"Job 'j' in state 'concluded' cannot accept command verb '{verb}'"
    with pytest.raises(Error, match="^Can't resume a job that was not paused$"):
        watch.jobs.resume("j")


async def test_a_job_pauses_at_its_pause_point_and_resumes(watch: Watch) -> None:
    job = watch.jobs.start("j", "create", forever)
    await settle()
    watch.jobs.pause("j")
    await settle()
    assert job.state is State.PAUSED
    with pytest.raises(Error, match="^Job is already paused$"):
        watch.jobs.pause("j")
    watch.jobs.resume("j")
    assert watch.seen == ["created", "running", "paused", "running"]
    watch.jobs.cancel("j")
    await job.wait()


async def test_a_job_without_pause_points_ends_although_it_was_told_to_pause(watch: Watch) -> None:
    job = watch.jobs.start("j", "create", nothing)
    watch.jobs.pause("j")
    await job.wait()
    assert job.state is State.CONCLUDED
    assert job.error is None


async def test_a_cancelled_job_ends_at_its_next_step(watch: Watch) -> None:
    job = watch.jobs.start("j", "create", forever)
    await settle()
    watch.jobs.cancel("j")
    assert watch.seen == ["created", "running"]
    await job.wait()
    assert watch.seen == ["created", "running", "aborting", "concluded"]
    assert watch.jobs.query()[0]["error"] == "Operation canceled"


async def test_a_job_cancelled_before_its_first_step_does_not_begin(watch: Watch) -> None:
    begun: list[Job] = []

    async def body(job: Job) -> None:
        begun.append(job)

    job = watch.jobs.start("j", "create", body)
    watch.jobs.cancel("j")
    await job.wait()
    assert begun == []
    assert watch.seen == ["created", "running", "aborting", "concluded"]


async def test_a_second_cancel_does_not_disturb_the_cleaning_up(watch: Watch) -> None:
    cleaned: list[bool] = []

    async def careful(job: Job) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await settle()
            cleaned.append(True)

    job = watch.jobs.start("j", "create", careful)
    await settle()
    watch.jobs.cancel("j")
    await asyncio.sleep(0)
    watch.jobs.cancel("j")
    await job.wait()
    assert cleaned == [True]


async def test_a_paused_job_runs_again_to_be_cancelled(watch: Watch) -> None:
    job = watch.jobs.start("j", "create", forever)
    await settle()
    watch.jobs.pause("j")
    await settle()
    watch.jobs.cancel("j")
    await job.wait()
    assert watch.seen == ["created", "running", "paused", "running", "aborting", "concluded"]


async def test_the_work_cleans_up_before_a_cancelled_job_is_over(watch: Watch) -> None:
    cleaned: list[State] = []

    async def careful(job: Job) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(job.state)

    job = watch.jobs.start("j", "create", careful)
    await settle()
    watch.jobs.cancel("j")
    await job.wait()
    assert cleaned == [State.RUNNING]


async def test_without_auto_finalize_a_job_waits_in_pending(watch: Watch) -> None:
    job = watch.jobs.start("j", "mirror", nothing, auto_finalize=False)
    await job.wait()
    assert job.state is State.PENDING
    with pytest.raises(Error, match="^Job 'j' in state 'pending' cannot accept command verb 'dismiss'$"):
        watch.jobs.dismiss("j")
    watch.jobs.finalize("j")
    assert watch.seen[-2:] == ["pending", "concluded"]


async def test_a_pending_job_can_be_cancelled(watch: Watch) -> None:
    job = watch.jobs.start("j", "mirror", nothing, auto_finalize=False)
    await job.wait()
    watch.jobs.cancel("j")
    assert watch.seen[-3:] == ["pending", "aborting", "concluded"]
    assert job.error == "Operation canceled"


async def test_with_auto_dismiss_a_job_is_gone_when_it_is_over(watch: Watch) -> None:
    await watch.jobs.start("j", "mirror", nothing, auto_dismiss=True).wait()
    assert watch.seen[-2:] == ["concluded", "null"]
    assert watch.jobs.query() == []
    watch.jobs.start("j", "mirror", nothing)
    await watch.jobs.close()


async def test_a_ready_job_goes_on_until_it_is_completed(watch: Watch) -> None:
    async def mirror(job: Job) -> None:
        job.report_progress(7, 7)
        job.become_ready()
        while not job.completion.is_set():
            await job.pause_point()
            await asyncio.sleep(0)

    job = watch.jobs.start("j", "mirror", mirror)
    with pytest.raises(Error, match="^Job 'j' in state 'running' cannot accept command verb 'complete'$"):
        watch.jobs.complete("j")
    await settle()
    watch.jobs.pause("j")
    await settle()
    watch.jobs.complete("j")
    watch.jobs.resume("j")
    await job.wait()
    assert watch.seen == [
        *("created", "running", "ready", "standby", "ready"),
        *("waiting", "pending", "concluded"),
    ]
    assert job.info()["total-progress"] == 7


async def test_closing_ends_every_job_newest_first(watch: Watch) -> None:
    await watch.jobs.start("done", "create", nothing).wait()
    await watch.jobs.start("pending", "create", nothing, auto_finalize=False).wait()
    running = watch.jobs.start("running", "create", forever)
    await settle()
    watch.seen.clear()
    await watch.jobs.close()
    assert running.state is State.NULL
    assert watch.seen.count("null") == 3
    assert watch.jobs.query() == []


def test_the_tables_speak_of_every_state_and_verb() -> None:
    assert NEXT.keys() == set(State)
    assert ALLOWED.keys() == set(Verb)
    reached = {State.UNDEFINED}.union(*NEXT.values())
    assert reached == set(State)
