"""An ordinary user: whom libvirt runs for in tests, and the emulator that this user can run.

libvirt's *session mode* is for ordinary users: virsh starts libvirt's daemons itself, and all that they keep
lies in the user's home and run-time directory.  Root has no session of its own.  Where the tests run as root
they therefore run such programs as the user "nobody" (libvirt refuses a number without an account), otherwise
as whoever the tests run as.

That user may not be able to read the checkout, the environment that the tests run in, or even their Python:
all may be below a home that is closed.  So the emulator is installed where everybody can read it, as
``make install`` does it, into an environment of its own; but out of what is here, with no package index: the
package from the checkout, and what it needs from the tests' environment.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from daemons import CHECKOUT
from peers import required, search_path

#: Peers that every test of libvirt needs.
LIBVIRT: Final = ("virsh", "libvirtd", "libvirt_driver_qemu.so", "libvirt_driver_secret.so", "setpriv")

#: The emulator as documents name it, in a checkout in which somebody has typed `make`.
EMULATOR: Final = '"$PWD/.venv/bin/qmpd-system-x86_64"'

_NOBODY: Final = "nobody"

#: As pip writes it for an entry point of the package.
_SCRIPT: Final = """\
#!{python}
import sys
from qmpd.cli.system import main
if __name__ == "__main__":
    sys.exit(main())
"""


def run(arguments: Sequence[str], home: Path, seconds: float) -> tuple[int, str]:
    """Run a command as the ordinary user, at home, and end all that it leaves behind.

    :param home: of :func:`home`.
    :param seconds: how long it may take.
    :return: its exit status, and what it and all of those printed.
    """
    process = subprocess.Popen(
        [sys.executable, CHECKOUT / "tests" / "reaper.py", *_as_user(), *arguments],
        cwd=home,
        env={
            "PATH": search_path(),
            "HOME": str(home),
            "TMPDIR": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "LC_ALL": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except BaseException:
        process.terminate()  # the reaper then ends the others
        print(process.communicate()[0])
        raise
    return process.returncode, printed


@contextmanager
def home() -> Iterator[Path]:
    """A directory that belongs to the ordinary user, until the block ends, with one for run-time files in it.

    Its name is short: libvirt makes UNIX sockets deep below it, and the name of one has 107 bytes at most.
    """
    made = Path(tempfile.mkdtemp(prefix="user.", dir="/tmp"))
    try:
        (made / "run").mkdir(0o700)
        if os.getuid() == 0:
            user = pwd.getpwnam(_NOBODY)
            for directory in (made, made / "run"):
                os.chown(directory, user.pw_uid, user.pw_gid)
        yield made
    finally:
        shutil.rmtree(made)


@contextmanager
def installed_emulator() -> Iterator[Path]:
    """Install ``qmpd-system-x86_64`` where everybody can run it, until the block ends; returns its path."""
    prefix = Path(tempfile.mkdtemp(prefix="qmpd.", dir="/tmp"))
    try:
        prefix.chmod(0o755)
        _install(prefix, _python())
        script = prefix / "bin" / "qmpd-system-x86_64"
        script.write_text(_SCRIPT.format(python=prefix / "bin" / "python3"))
        script.chmod(0o755)
        yield script
    finally:
        shutil.rmtree(prefix)


def _as_user() -> list[str]:
    if os.getuid() != 0:
        return []
    user = pwd.getpwnam(_NOBODY)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _python() -> Path:
    """Return an interpreter that the ordinary user can run, of the version of this one.

    Of the same one, because what is compiled in the packages fits no other.
    """
    name = f"python3.{sys.version_info.minor}"
    candidates = (Path(sys.executable).resolve(), Path("/usr/bin", name), Path("/usr/local/bin", name))
    for python in candidates:
        # setpriv still has root's rights when it looks for a program, env has not.
        check = [*_as_user(), "env", str(python), "-c", "import ssl, venv"]
        try:
            if subprocess.run(check, capture_output=True, check=False, cwd="/").returncode == 0:
                return python
        except OSError:
            pass
    reason = f"no {name} that an ordinary user can run: {', '.join(map(str, candidates))}"
    raise LookupError(reason) if required() else unittest.SkipTest(reason)


def _install(prefix: Path, python: Path) -> None:
    umask = os.umask(0o022)
    try:
        subprocess.run([python, "-I", "-m", "venv", "--without-pip", prefix], check=True)
        packages = prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        # The schema is a link in a checkout, and a directory of the package where it is installed.
        shutil.copytree(CHECKOUT / "qmpd", packages / "qmpd", ignore=shutil.ignore_patterns("__pycache__"))
        for name in _requirements():
            _copy_distribution(name, packages)
        # Whoever runs it can't write there.
        subprocess.run([python, "-I", "-m", "compileall", "-q", packages / "qmpd"], check=True)
    finally:
        os.umask(umask)


def _requirements() -> Sequence[str]:
    text = (CHECKOUT / "requirements.txt").read_text()
    return [name for name in re.findall(r"^([A-Za-z0-9_.-]+)==", text, re.MULTILINE) if name != "setuptools"]


def _copy_distribution(name: str, packages: Path) -> None:
    """Copy what was installed as *name*, if it was: one that is optional may not be there."""
    try:
        files = distribution(name).files or ()
    except PackageNotFoundError:
        return
    for file in files:
        if ".." in file.parts:  # scripts: they are not needed
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(str(file.locate()))
        if source.exists():
            shutil.copyfile(source, target)
            # What is compiled carries the time of what it was compiled from.
            os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
