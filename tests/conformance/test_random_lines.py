"""Whatever a person types, the text monitors of qmpd and QEMU answer the same.

A seed makes some hundred lines, always the same ones, out of names of commands, options, words, quoted
strings, sizes, addresses and blanks, most of them wrong.  ``qmpdiff`` plays them to one process each.
Only words are put together of which both have the command; an option that is wrong in two ways is not made.
"""

from __future__ import annotations

import contextlib
import io
import sys
from random import Random
from typing import Final

import pytest
from daemons import CHECKOUT
from harness import load_qmpdiff

qmpdiff = load_qmpdiff()

LENGTH: Final = 600

#: Seconds for one step of a daemon.
PATIENCE: Final = 20

BLANKS: Final = (" ", " ", " ", " ", "  ", "\t", "\n", " \t ", "")

#: Their arguments are mostly wrong, and do no harm where they are right.
COMMANDS: Final = (
    *("info block", "info block", "info status", "info uuid", "info block-jobs", "info  qom-tree"),
    *("stop", "s", "system_reset", "qemu-io", "qemu-io -d", "device_del", "object_del", "object_add"),
    *("qom-get", "qom-get", "qom-set", "qom-set", "qom-list", "block_resize", "block_resize", "drive_del"),
    *("nbd_server_add", "nbd_server_remove", "nbd_server_stop", "nbd_server_start"),
    *("snapshot_blkdev", "snapshot_blkdev_internal", "snapshot_delete_blkdev_internal"),
    *("device_add", "nope", "inf", "info", "info nope", "help nope", "help info nope", "/", "", '"stop"'),
)

WORDS: Final = (
    *("a", "b", "nope", "length", "type", "/", "/objects", "/objects/io", "io", "poll-max-ns", "a/b"),
    *('"a"', '"a b"', '"a', 'a"', '"a"b', '""', r'"\""', r'"\n"', r'"\x"', '"a\\', r"a\n", "'a'", "'", '"'),
    *("-n", "-v", "-nv", "-d", "-j", "-f", "-w", "-a", "-x", "-", "--", "-n-v", "-vn", "--n", "-0"),
    *("1", "0", "1M", "1.5", "1.5k", "0x10", "0x1k", "0x", "010", "1e3", "-1", "+1", "7E", "8E", "16E", "1x"),
    *(".5", "5.", ".", "1.0B", "1.5B", "1 k", "99999999999999999999", "0.000001", "1..5", "M", "0b1"),
    *("{}", "[1", "{'a'", "5", "true", "on", "off", "@", "a,b", "a=b", "=", ",", ",,", "help", "frob,a=b"),
    *("iothread,id=1", "iothread", "iothread,,id=x", "iothread,id=i j", "id=x", "secret", "x,id"),
    *("virtio-blk-pci", "virtio-blk-pci,drive=nope", "virtio-blk-pci,drive=a,num-queues=x"),
    *("unix:", "tcp:", "tcp:x", "x:", ":", "[::1", "[::1]:", "x:0,ipv4=x", "fd:", "vsock:", "vsock:x"),
    *("\\", "\x01", "\x7f", "\u00e4", '"\u00e4"', "\U0001f600", "a\u00a0b", "a" * 70),
)


def lines(seed: int) -> list[str]:
    """Return the lines that *seed* makes; nothing else decides about them."""
    source = Random(seed)
    made = []
    while len(made) < LENGTH:
        line = source.choice(("", "", "", " ", "\t")) + source.choice(COMMANDS)
        for _ in range(source.choice((0, 1, 1, 1, 2, 2, 3, 4))):
            line += source.choice(BLANKS) + source.choice(WORDS)
        line += source.choice(("", "", " ", "\n"))
        if not is_left_out(line):
            made.append(line)
    return made


def is_left_out(line: str) -> bool:
    """Whether the answer is in our own words, or about the whole machine, of which qmpd has a part.

    Properties are listed in the order of QEMU's hash tables there.  ``snapshot_blkdev -f`` is no mistake to
    QEMU, because an f stands behind a dash in the name of a parameter.  A refused `object_add` repeats
    nothing of a secret, and does not explain what an identifier is.
    """
    words = line.split()
    return (
        words in (["info"], ["info", "qom-tree"])
        or "help" in words
        or ",help" in line
        or (words[:1] == ["qom-list"] and len(words) == 2)
        or words[:2] == ["snapshot_blkdev", "-f"]
        or (words[:1] == ["object_add"] and ("secret" in line or "iothread,id=1" in line or "id=i j" in line))
    )


@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_line_that_a_person_types_is_answered_as_qemu_answers_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    steps = [{"cmd": {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "a"}}}]
    steps.append({"cmd": {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io"}}})
    steps += [
        {"cmd": {"execute": "human-monitor-command", "arguments": {"command-line": line}}}
        for line in lines(seed)
    ]
    case = qmpdiff.Case(name=f"seed {seed}", persona="system", machine="pc", steps=steps)
    sides = {
        "QEMU": ("qemu-system-x86_64", "system"),
        "qmpd": (f"{sys.executable} -m qmpd.cli.system", "system"),
    }
    results = qmpdiff.run_case(case, sides, PATIENCE, keep=False)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        for found in qmpdiff.differing_steps(case, results["QEMU"], results["qmpd"]):
            qmpdiff.print_diff(*found)
    assert not report.getvalue(), f"-QEMU +qmpd\n{report.getvalue()}"
