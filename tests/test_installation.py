"""An installed qmpd has everything with it, and says the same version everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from daemons import CHECKOUT

import qmpd


def test_a_wheel_carries_the_schema_and_finds_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("qmpd", "schema"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, symlinks=True, ignore=without)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = (*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    subprocess.run(build, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    found = subprocess.run(
        [sys.executable, "-c", "from qmpd.qapi import schema_directory; print(schema_directory())"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(found).is_relative_to(installed)
    carried = {path.name: path.read_bytes() for path in Path(found).glob("*.json")}
    assert carried == {path.name: path.read_bytes() for path in (CHECKOUT / "schema").glob("*.json")}
    assert "qapi-schema.json" in carried


def test_the_pinned_versions_satisfy_the_ranges_of_the_package() -> None:
    requirements = (CHECKOUT / "requirements.txt").read_text()
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", requirements, re.M)
    pins = {name.lower(): tuple(int(part) for part in version.split(".")) for name, version in pinned}
    project = (CHECKOUT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)
    needed = re.findall(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)"', listed)
    assert needed
    for name, oldest in needed:
        assert pins[name.lower()] >= tuple(int(part) for part in oldest.split(".")), name


def test_the_program_says_the_version_of_the_package() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "qmpd", "--version"], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    assert qmpd.__version__ in shown.stdout
