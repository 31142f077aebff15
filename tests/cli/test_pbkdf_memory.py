"""``--pbkdf-memory-max``: no header takes more memory than the daemon may have for its keys."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import StartDaemon
from daemons import CHECKOUT, PATIENCE, QMPD, CommandError, Connection, RunningDaemon

from qmpd.cli.options import scan
from qmpd.cli.process import Settings, read_settings

REFUSAL = "The key derivation needs 65536 KiB of memory, and --pbkdf-memory-max allows 32768"


@pytest.mark.parametrize(
    ("written", "kibibytes"),
    [("32K", 32), ("33554432", 32768), ("1.5M", 1536), ("2g", 2 << 20), ("33791", 32), ("0x100000", 1024)],
)
def test_a_size_is_read_as_in_other_options(written: str, kibibytes: int) -> None:
    assert read_settings(list(scan(["--pbkdf-memory-max", written]))).pbkdf_memory == kibibytes


def test_without_the_option_the_machine_decides() -> None:
    assert Settings().pbkdf_memory is None


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A LUKS2 volume by cryptsetup, whose keyslot 0 needs 64 MiB."""
    (tmp_path / "passphrase").write_text("abc123")
    path = tmp_path / "disk.luks"
    path.touch()
    path.open("r+b").truncate(18 << 20)
    costs = ("--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4")
    cryptsetup("luksFormat", "--type", "luks2", *costs, str(path), directory=tmp_path)
    return path


def cryptsetup(*arguments: str, directory: Path) -> None:
    subprocess.run(
        ["cryptsetup", "--batch-mode", "--key-file", "passphrase", *arguments], cwd=directory, check=True
    )


def add(daemon: RunningDaemon, volume: Path) -> None:
    file = {"driver": "file", "filename": str(volume)}
    options: dict[str, Any] = {"driver": "luks", "node-name": "disk", "file": file, "key-secret": "s"}
    daemon.execute("blockdev-add", options)


SECRET = ("--object", "secret,id=s,file=passphrase")


@pytest.mark.peer("cryptsetup")
def test_a_header_that_needs_more_is_refused_and_the_daemon_lives_on(
    start_daemon: StartDaemon, volume: Path
) -> None:
    daemon = start_daemon("--pbkdf-memory-max", "32M", *SECRET)
    with pytest.raises(CommandError) as refusal:
        add(daemon, volume)
    assert refusal.value.desc == REFUSAL
    assert daemon.node_names() == set()
    assert daemon.quit() == 0


@pytest.mark.peer("cryptsetup")
def test_no_header_is_made_that_needs_more(start_daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("abc123")
    new = tmp_path / "new.luks"
    new.touch()
    daemon = start_daemon("--pbkdf-memory-max", "32M", *SECRET)
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(new)})
    options = {"driver": "luks", "file": "new", "size": 1 << 20, "key-secret": "s", "version": 2}
    with Connection(daemon.socket) as connection:
        assert connection.run_job("blockdev-create", "j", {**options, "pbkdf-memory": 65536}) == REFUSAL
        assert new.stat().st_size == 0
        assert connection.run_job("blockdev-create", "j", {**options, "iter-time": 400}) is None
    dump = subprocess.run(["cryptsetup", "luksDump", str(new)], check=True, capture_output=True, text=True)
    (memory,) = re.findall(r"Memory: +([0-9]+)", dump.stdout)
    assert int(memory) <= 32768


@pytest.mark.peer("cryptsetup")
def test_with_a_higher_limit_it_opens(start_daemon: StartDaemon, volume: Path) -> None:
    daemon = start_daemon("--pbkdf-memory-max", "64M", *SECRET)
    add(daemon, volume)
    assert daemon.node_names() >= {"disk"}


@pytest.mark.peer("cryptsetup")
def test_another_keyslot_that_needs_less_opens_it_under_the_limit(
    start_daemon: StartDaemon, volume: Path
) -> None:
    costs = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    cryptsetup("luksAddKey", *costs, str(volume), "passphrase", directory=volume.parent)
    daemon = start_daemon("--pbkdf-memory-max", "32M", *SECRET)
    add(daemon, volume)
    assert daemon.node_names() >= {"disk"}


@pytest.mark.peer("cryptsetup")
def test_on_the_command_line_a_header_that_needs_more_ends_the_start(volume: Path) -> None:
    disk = f"luks,node-name=disk,file.driver=file,file.filename={volume.name},key-secret=s"
    ended = subprocess.run(
        [*QMPD, "--pbkdf-memory-max=32M", *SECRET, "--blockdev", disk],
        cwd=volume.parent,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (1, f"qmpd: --blockdev {disk}: {REFUSAL}\n")
