"""libvirt with qmpd's emulator, beside QEMU's: what a user of virsh waits for.

Each round is a new session of an ordinary user, whose libvirt knows nothing of
the emulator yet, so that defining the domain includes the probing.  A figure
is from the start of virsh to its end.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from bench.table import Aim, Row, Samples

#: What the table calls the emulators.
QMPD: Final = "qmpd-system-x86_64"
QEMU: Final = "qemu-system-x86_64"

_TESTS: Final = Path(__file__).parent.parent / "tests"

_ROWS: Final[Mapping[str, Row]] = {
    "define": Row("define, the emulator unknown", "s", (Aim(3),)),
    "start": Row("start", "s"),
    "attach": Row("attach a LUKS disk", "s"),
    "detach": Row("detach it", "s", (Aim(1),)),
    "destroy": Row("destroy", "s"),
}

#: A session's commands.  On this machine QEMU needs no guest to let go of a disk.
_SESSION: Final = r"""
export LIBVIRT_DEFAULT_URI=qemu:///session
measure() {
    local name=$1 began
    shift
    began=$(date +%s%N)
    "$@" || exit
    echo "measured $name $(($(date +%s%N) - began))"
}
printf passphrase >passphrase
qemu-img create -q -f luks --object secret,id=s,file=passphrase -o key-secret=s,iter-time=10 disk.luks 16M
secret=5b6a1a1c-0f0e-4c52-9a8d-2f1d6e1f0a02
echo "<secret ephemeral='no' private='yes'><uuid>$secret</uuid></secret>" >secret.xml
cat >disk.xml <<XML
<disk type='file' device='disk'><driver name='qemu' type='raw'/>
 <source file='$PWD/disk.luks'>
  <encryption format='luks'><secret type='passphrase' uuid='$secret'/></encryption></source>
 <target dev='vda' bus='virtio'/></disk>
XML
cat >vm.xml <<XML
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
 <name>vm</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>
 <features><acpi/></features>
 <devices><emulator>$1</emulator><controller type='usb' model='none'/><memballoon model='none'/>
  <controller type='pci' index='0' model='pcie-root'/>
  <controller type='pci' index='1' model='pcie-root-port'/></devices>
 <qemu:commandline><qemu:arg value='-global'/>
  <qemu:arg value='ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off'/></qemu:commandline>
</domain>
XML
# This starts libvirt's daemons.
virsh secret-define secret.xml && virsh secret-set-value $secret --file passphrase --plain || exit
measure define virsh define vm.xml
measure start virsh start vm --paused
measure attach virsh attach-device vm disk.xml
measure detach virsh detach-device vm disk.xml
measure destroy virsh destroy vm
"""


@dataclass(frozen=True)
class Settings:
    """How much is done.

    :param rounds: how often everything is measured.
    """

    rounds: int = 5


QUICK: Final = Settings(rounds=1)


def missing() -> str | None:
    """Say what it takes that is not installed, or return None."""
    programs = ("virsh", "qemu-img", "setpriv")
    return next((program for program in programs if shutil.which(program) is None), None)


def run(settings: Settings) -> Samples:
    """Measure the emulators in turn; QEMU's only where it is installed.

    :raise RuntimeError: a session failed.
    """
    # An ordinary user, and an emulator that this user can run, are the tests' to make.
    sys.path.append(str(_TESTS))
    ordinary_user = import_module("ordinary_user")
    samples = Samples()
    with ExitStack() as stack:
        emulators = {QMPD: str(stack.enter_context(ordinary_user.installed_emulator()))}
        peer = shutil.which(QEMU)
        if peer is not None:
            emulators[QEMU] = peer
        for number in range(settings.rounds):
            samples.next_round()
            for name, path in list(emulators.items())[:: -1 if number % 2 else 1]:
                for step, seconds in _session(ordinary_user, path).items():
                    samples.add(_ROWS[step], name, seconds)
    return samples


def _session(ordinary_user: Any, emulator: str) -> dict[str, float]:
    with ordinary_user.home() as home:
        status, printed = ordinary_user.run(["bash", "-c", _SESSION, "bash", emulator], home, 120)
    if status != 0:
        raise RuntimeError(printed)
    measured = re.findall(r"^measured (\w+) (\d+)$", printed, re.MULTILINE)
    return {step: int(nanoseconds) / 1e9 for step, nanoseconds in measured}
