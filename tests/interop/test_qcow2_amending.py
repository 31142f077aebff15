"""qcow2 images amended over QMP while they are exported, judged by QEMU's programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CommandError, RunningDaemon
from qcow2_images import run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE: Final = 8 << 20
SECRET: Final = ("--object", "secret,id=pw,data=pw")


def amend(
    daemon: RunningDaemon, options: dict[str, Any], *, force: bool = False, command: str = "blockdev-amend"
) -> tuple[str | None, tuple[int, int]]:
    """Amend the node "d" to the end; what the job says of an error, and its progress."""
    client = daemon.monitor
    arguments = {"job-id": "j", "node-name": "d", "options": {"driver": "qcow2", **options}, "force": force}
    client.execute(command, arguments)
    client.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    (job,) = client.execute("query-jobs")
    client.execute("job-dismiss", {"id": "j"})
    assert job["type"] == "amend"
    return job.get("error"), (job["current-progress"], job["total-progress"])


def open_image(daemon: RunningDaemon, path: Path, **options: Any) -> str:
    """Open an image as "d" and export it; its URI."""
    address = {"type": "unix", "data": {"path": str(daemon.directory / "nbd.sock")}}
    file = {"driver": "file", "filename": str(path)}
    daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "d", "file": file, **options})
    daemon.execute("nbd-server-start", {"addr": address})
    daemon.execute(
        "block-export-add", {"type": "nbd", "id": "e", "node-name": "d", "name": "d", "writable": True}
    )
    return f"nbd+unix:///d?socket={daemon.directory / 'nbd.sock'}"


def close_image(daemon: RunningDaemon) -> None:
    daemon.execute("nbd-server-stop")
    daemon.monitor.wait_event("BLOCK_EXPORT_DELETED", id="e")
    daemon.execute("blockdev-del", {"node-name": "d"})


def specifics(daemon: RunningDaemon) -> dict[str, Any]:
    (node,) = [n for n in daemon.execute("query-named-block-nodes") if n["node-name"] == "d"]
    found: dict[str, Any] = node["image"]["format-specific"]["data"]
    return found | {"size": node["image"]["virtual-size"]}


def test_an_exported_image_becomes_another(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "d.qcow2", str(SIZE))
    uri = open_image(daemon, path)
    run(tmp_path, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "write -z 1M 1M", uri)
    error, progress = amend(
        daemon,
        {"refcount-bits": 64, "lazy-refcounts": True, "version": "v3"},
        command="x-blockdev-amend",
    )
    assert error is None
    assert progress[0] == progress[1] > 2
    found = specifics(daemon)
    assert (found["refcount-bits"], found["lazy-refcounts"]) == (64, True)
    checks = ("-c", "read -P 1 0 1M", "-c", "read -P 0 1M 1M", "-c", "write -P 2 3M 64k")
    run(tmp_path, "qemu-io", "-f", "raw", *checks, uri)
    assert amend(daemon, {"version": "v2"})[0] == "compat=0.10 requires refcount_bits=16"
    # As for block_resize, an export's clients are promised that the size stays.
    error, _ = amend(daemon, {"version": "v2", "refcount-bits": 16, "size": SIZE * 2})
    assert error is not None
    assert error.startswith("Permission conflict on node 'd': permissions 'resize' are both required by")
    assert specifics(daemon) == found
    assert amend(daemon, {"version": "v2", "refcount-bits": 16})[0] is None
    found = specifics(daemon)
    assert (found["compat"], found["refcount-bits"]) == ("0.10", 16)
    run(tmp_path, "qemu-io", "-f", "raw", *checks, "-c", "read -P 2 3M 64k", uri)
    close_image(daemon)
    run(tmp_path, "qemu-img", "check", "d.qcow2")
    run(tmp_path, "qemu-io", "-f", "qcow2", *checks, "-c", "read -P 2 3M 64k", "d.qcow2")
    found = json.loads(run(tmp_path, "qemu-img", "info", "--output=json", "d.qcow2"))
    assert found["format-specific"]["data"]["compat"] == "0.10"
    daemon.assert_alive()


def test_keyslots_and_the_rest_are_amended_together_or_not(daemon: RunningDaemon, tmp_path: Path) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=pw,encrypt.iter-time=10"
    run(tmp_path, "qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", options, "d.qcow2", str(SIZE))
    for name in ("pw", "new"):
        daemon.execute("object-add", {"qom-type": "secret", "id": name, "data": name})
    path = tmp_path / "d.qcow2"
    uri = open_image(daemon, path, encrypt={"format": "luks", "key-secret": "pw"})
    run(tmp_path, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", uri)
    keys = {"format": "luks", "state": "active", "new-secret": "new", "keyslot": 3, "iter-time": 10}
    assert amend(daemon, {"encrypt": keys, "data-file": "x"})[0] == (
        "data-file can only be set for images that use an external data file"
    )
    assert not specifics(daemon)["encrypt"]["slots"][3]["active"]
    assert amend(daemon, {"encrypt": keys, "refcount-bits": 1})[0] is None
    found = specifics(daemon)
    assert found["encrypt"]["slots"][3]["active"]
    assert found["refcount-bits"] == 1
    close_image(daemon)
    secret = ("--object", "secret,id=pw,data=new")
    opened = f"driver=qcow2,file.filename={path},encrypt.format=luks,encrypt.key-secret=pw"
    run(tmp_path, "qemu-io", *secret, "--image-opts", "-c", "read -P 1 0 1M", opened)
    run(tmp_path, "qemu-img", "check", *secret, "--image-opts", opened)


def test_what_can_not_be_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "d.qcow2", str(SIZE))
    run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "d.qcow2", "-F", "qcow2", "o.qcow2")
    open_image(daemon, tmp_path / "d.qcow2")
    for options, text in (
        ({"version": "v4"}, "Parameter 'version' does not accept value 'v4'"),
        ({"cluster-size": 512}, "Parameter 'options.cluster-size' is unexpected"),
        ({"refcount-bits": "8"}, "Invalid parameter type for 'options.refcount-bits', expected: integer"),
    ):
        with pytest.raises(CommandError) as caught:
            amend(daemon, options)
        assert caught.value.desc == text
    assert amend(daemon, {"backing-file": "o.qcow2"})[0] == "Cannot amend the backing file"
    assert amend(daemon, {"size": 1000})[0] == "The new size must be a multiple of 512"
    close_image(daemon)
    overlay = {"driver": "file", "filename": str(tmp_path / "o.qcow2")}
    image = {
        "driver": "qcow2",
        "node-name": "d",
        "file": {"driver": "file", "filename": str(tmp_path / "d.qcow2")},
    }
    daemon.execute("blockdev-add", image)
    daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": overlay, "backing": "d"})
    error, _ = amend(daemon, {"size": SIZE * 2})
    assert error == "Node 'd' is busy: node is used as backing hd of 'o'"
    # Nothing of the disk changes by these.
    assert amend(daemon, {"refcount-bits": 8, "lazy-refcounts": True})[0] is None
    daemon.assert_alive()
