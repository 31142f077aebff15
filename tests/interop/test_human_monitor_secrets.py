"""What a person types is in no log, whether it is taken or refused."""

from __future__ import annotations

from pathlib import Path

from daemons import QMPD, RunningDaemon

LINES = (
    "object_add secret,id=s,data=hunter2",
    "object_add secret,id=s,data=hunter2",
    "object_add secret,id=t,hunter2",
    "object_add secret,id=hunter2 x,data=hunter2",
    "objectadd secret,id=t,data=hunter2",
    'object_add secret,id=u,data="hunter2',
    "qom-set /objects/s data hunter2",
    'object_del "hunter2',
)


def test_what_a_person_types_is_in_no_log(tmp_path: Path) -> None:
    daemon = RunningDaemon(QMPD, ["--log", "debug"], tmp_path)
    try:
        answers = [daemon.execute("human-monitor-command", {"command-line": line}) for line in LINES]
        assert answers[0] == ""
        assert not any("hunter2" in answer for answer in answers)
        assert daemon.execute("qom-get", {"path": "/objects/s", "property": "type"}) == "secret"
    finally:
        daemon.kill()
    assert "hunter2" not in daemon.stderr.read_text() + daemon.stdout.read_text()
