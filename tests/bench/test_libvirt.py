"""The benchmark's sessions of libvirt run, with whatever emulators are there."""

from __future__ import annotations

import ordinary_user
import pytest

from bench import libvirt


@pytest.mark.timeout(200)
@pytest.mark.peer(*ordinary_user.LIBVIRT, "qemu-img", "qemu-system-x86_64")
def test_every_step_of_a_session_is_measured_with_both_emulators() -> None:
    samples = libvirt.run(libvirt.QUICK)
    steps = {(row.title, name) for row in samples.rows() for name in (libvirt.QMPD, libvirt.QEMU)}
    assert len(steps) == 10
    assert all(
        len(samples.values(row, name)) == 1 for row in samples.rows() for name in (libvirt.QMPD, libvirt.QEMU)
    )
