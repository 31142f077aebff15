"""A guest's disk whose storage fails."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from qmpd.commands.block_core import block_info, disk_stats
from qmpd.qom.devices import Devices
from qmpd.qom.guest_disk import GuestDisk

Events = list[tuple[str, dict[str, Any]]]


class Failing:
    """The disk "d" on the node "n", whose reads and writes fail with `number` as long as that is not 0."""

    def __init__(self, devices: Devices, monkeypatch: pytest.MonkeyPatch, **properties: str) -> None:
        options = {name.replace("_", "-"): value for name, value in properties.items()}
        devices.add({"driver": "virtio-blk-pci", "id": "d", "drive": "n", **options})
        disk = devices.disk("d")
        assert isinstance(disk, GuestDisk)
        self.disk, self.number = disk, 0

        async def read(offset: int, length: int) -> bytes:
            self.fail()
            return b"x" * length

        async def write(*arguments: Any, **options: Any) -> None:
            self.fail()

        monkeypatch.setattr(disk.node, "pread", read)
        for name in ("pwrite", "pwrite_zeroes", "pdiscard", "flush"):
            monkeypatch.setattr(disk.node, name, write)

    def fail(self) -> None:
        if self.number:
            raise OSError(self.number, "in a test's words")

    @property
    def io_status(self) -> str | None:
        return block_info(self.disk).get("io-status")


PATH = "/machine/peripheral/d/virtio-backend"
NO_SPACE, IO = errno.ENOSPC, errno.EIO


@pytest.mark.parametrize(
    ("werror", "number", "told", "status"),
    [
        # As qemu-system-x86_64 10.0 does, but for "stop", which needs a machine.
        ("report", IO, {"action": "report"}, None),
        ("report", NO_SPACE, {"action": "report"}, None),
        ("enospc", IO, {"action": "report", "nospace": False}, "ok"),
        ("enospc", NO_SPACE, {"action": "report", "nospace": True}, "nospace"),
        ("auto", IO, {"action": "report", "nospace": False}, "ok"),
        ("auto", NO_SPACE, {"action": "report", "nospace": True}, "nospace"),
        ("stop", IO, {"action": "report", "nospace": False}, "failed"),
        ("stop", NO_SPACE, {"action": "report", "nospace": True}, "nospace"),
    ],
)
async def test_a_failed_write_is_told_of_as_werror_says(
    devices: Devices,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    werror: str,
    number: int,
    told: dict[str, Any],
    status: str | None,
) -> None:
    failing = Failing(devices, monkeypatch, werror=werror)
    failing.number = number
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pwrite(0, b"data")
    reason = "No space left on device" if number == NO_SPACE else "Input/output error"
    common = {"device": "", "node-name": "n", "qom-path": PATH, "operation": "write", "reason": reason}
    assert events == [("BLOCK_IO_ERROR", {**common, **told})]
    assert failing.io_status == status


@pytest.mark.parametrize(
    ("rerror", "status"), [("auto", "ok"), ("report", "ok"), ("enospc", "ok"), ("stop", "failed")]
)
async def test_a_failed_read_is_told_of_as_rerror_says(
    devices: Devices, events: Events, monkeypatch: pytest.MonkeyPatch, rerror: str, status: str
) -> None:
    failing = Failing(devices, monkeypatch, rerror=rerror)
    failing.number = IO
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pread(0, 512)
    ((_, data),) = events
    assert (data["operation"], data["action"], data["nospace"]) == ("read", "report", False)
    assert failing.io_status == status


async def test_what_is_to_be_ignored_is_taken_for_done(
    devices: Devices, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(devices, monkeypatch, rerror="ignore", werror="ignore")
    failing.number = NO_SPACE
    assert await failing.disk.pread(0, 512) == bytes(512)
    await failing.disk.pwrite(0, b"data")
    await failing.disk.write_zeroes(0, 512)
    await failing.disk.discard(0, 512)
    await failing.disk.flush()
    assert [(data["operation"], data["action"]) for _, data in events] == [
        ("read", "ignore"),
        *[("write", "ignore")] * 4,
    ]
    assert all("nospace" not in data for _, data in events)
    stats = disk_stats(failing.disk)["stats"]
    assert (stats["wr_operations"], stats["wr_bytes"], stats["failed_wr_operations"]) == (2, 516, 0)


async def test_the_status_is_good_again_with_the_next_good_request_of_the_kind(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(devices, monkeypatch)
    failing.number = NO_SPACE
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pwrite(0, b"data")
    failing.number = 0
    await failing.disk.pread(0, 512)
    await failing.disk.flush()
    assert failing.io_status == "nospace"
    await failing.disk.pwrite(0, b"data")
    assert failing.io_status == "ok"


async def test_the_status_is_good_again_when_the_machine_goes_on(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(devices, monkeypatch)
    failing.number = NO_SPACE
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pwrite(0, b"data")
    assert failing.io_status == "nospace"
    devices.forget_failures()
    assert failing.io_status == "ok"


async def test_only_the_guest_s_failures_are_told_of(
    devices: Devices, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(devices, monkeypatch, werror="ignore")
    failing.number = IO
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pwrite(0, b"data", counted=False)
    failing.number = errno.EOPNOTSUPP
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.write_zeroes(0, 512, fast=True)
    assert events == []


@pytest.mark.parametrize("wanted", ["on", "off", "auto"])
async def test_failures_take_time_unless_they_are_not_to_be_accounted(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    failing = Failing(devices, monkeypatch, account_failed=wanted, account_invalid=wanted)
    assert "idle_time_ns" not in disk_stats(failing.disk)["stats"]
    failing.number = IO
    with pytest.raises(OSError, match="in a test's words"):
        await failing.disk.pwrite(0, b"data")
    stats = disk_stats(failing.disk)["stats"]
    assert (stats["failed_wr_operations"], stats["wr_operations"], stats["wr_bytes"]) == (1, 0, 0)
    assert stats["account_failed"] is stats["account_invalid"] is (wanted != "off")
    assert bool(stats["wr_total_time_ns"]) is ("idle_time_ns" in stats) is (wanted != "off")
