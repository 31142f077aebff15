from __future__ import annotations

from typing import Any

import pytest

from qmpd.commands.human import printed

NODE: dict[str, Any] = {
    "node-name": "n",
    "drv": "qcow2",
    "file": "a.qcow2",
    "ro": False,
    "encrypted": False,
    "cache": {"writeback": True, "direct": False, "no-flush": False},
    "detect_zeroes": "off",
    **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
    "image": {"filename": "a.qcow2", "format": "qcow2", "virtual-size": 1 << 20, "actual-size": 512},
}

IMAGE = """n: a.qcow2 (qcow2)
    Cache mode:       writeback

Images:
image: a.qcow2
file format: qcow2
virtual size: 1 MiB (1048576 bytes)
disk size: 512 B
"""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1023999, "1e+03 KiB"),
        (1024000, "0.977 MiB"),
        (3117056, "2.97 MiB"),
        ((1 << 40) - 1, "1 TiB"),
        ((1 << 64) - 1, "16 EiB"),
    ],
)
def test_a_size_has_three_digits_and_a_unit_from_a_thousand_on(number: int, text: str) -> None:
    assert printed.size(number) == text


def test_an_image_is_shown_with_what_is_known_of_it() -> None:
    assert printed.node(NODE, verbose=True) == IMAGE
    snapshot = {
        "id": "1",
        "name": "before",
        "vm-state-size": 2048,
        "date-sec": 0,
        "date-nsec": 0,
        "vm-clock-sec": 3723,
        "vm-clock-nsec": 45_000_000,
    }
    more = {
        "encrypted": True,
        "cluster-size": 65536,
        "dirty-flag": True,
        "backing-filename": "b",
        "backing-filename-format": "raw",
        "snapshots": [snapshot],
        "format-specific": {"type": "x", "data": {"of-ours": [True, {"a-b": 1}], "compat": "1.1"}},
    }
    shown = printed.node(NODE | {"image": NODE["image"] | more}, verbose=True)
    assert shown.startswith(
        IMAGE
        + "encrypted: yes\ncluster_size: 65536\ncleanly shut down: no\n"
        + "backing file: b (cannot determine actual path)\nbacking file format: raw\nSnapshot list:\n"
        + "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n"
        + "1       before              2 KiB "
    )
    assert shown.endswith(
        "  0001:02:03.045         --\nFormat specific information:\n"
        "    compat: 1.1\n    of ours:\n        [0]: true\n        [1]:\n            a b: 1\n"
    )


def test_a_disk_that_has_lost_its_node_goes_by_its_device() -> None:
    info = {
        "device": "",
        "removable": True,
        "locked": False,
        "tray_open": True,
        "qdev": "hd",
        "io-status": "failed",
    }
    assert printed.disk(info, verbose=True) == (
        "hd: [not inserted]\n    Attached to:      hd\n    I/O status:       failed\n"
        "    Removable device: not locked, tray open\n"
    )


@pytest.mark.parametrize(
    ("running", "status", "text"),
    [
        (True, "running", "VM status: running\n"),
        (False, "paused", "VM status: paused\n"),
        (False, "prelaunch", "VM status: paused (prelaunch)\n"),
        (False, "shutdown", "VM status: paused (shutdown)\n"),
    ],
)
def test_a_run_state_is_told_in_full_if_nobody_asked_for_it(running: bool, status: str, text: str) -> None:
    assert printed.status({"running": running, "status": status}) == text
