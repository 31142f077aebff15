"""Block devices for tests: a file behind a loop device of the kernel's.

It takes root, and a kernel that has them; a sandbox may have neither.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[Path]:
    """A block device with the bytes of a file.

    :param options: more options of losetup(8).
    :raise OSError: if there are no such devices here.
    """
    command = ["losetup", "--find", "--show", *options, str(image)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr) from None
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@cache
def available() -> bool:
    """Whether this user of this machine can have them."""
    if shutil.which("losetup") is None:
        return False
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(1 << 20)
        try:
            with loop_device(Path(image.name)) as device:
                return device.is_block_device()
        except OSError:
            return False
