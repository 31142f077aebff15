"""The data path's benchmark: what it makes of its clients' reports, and that it runs with the real ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import CHECKOUT

from bench.chains import CHAINS, PASSPHRASE, filled
from bench.data_path import RANDOM, SATURATING, Settings, chosen_loads, percentile, random_title
from bench.document import BENCHMARKS, PERFORMANCE, README, replaced
from bench.nbd_clients import ClientFailed, RandomLoad, fio_result
from bench.nbd_servers import NbdServer
from bench.servers import Program

RAW, LUKS = (next(chain for chain in CHAINS if chain.name == name) for name in ("raw", "luks"))


def report(error: int = 0) -> str:
    return json.dumps({"jobs": [{"error": error, "read": {"bw_bytes": 4096000, "iops": 1000.5}}]})


def test_fios_report_is_found_behind_its_warnings() -> None:
    result = fio_result(f"fio: a note about something\n{report()}", "read")
    assert (result.rate, result.requests) == (4096000, 1000.5)


@pytest.mark.parametrize(
    "output", ["", "no braces", '{"jobs": []}', '{"jobs": [{"error": 0}]}', report(error=5)]
)
def test_a_report_of_an_error_or_of_nothing_is_no_figure(output: str) -> None:
    with pytest.raises(ClientFailed):
        fio_result(output, "read")


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (99.5, 100), (0, 1)])
def test_a_percentile_is_a_value_that_was_measured(percent: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == expected


def test_a_single_round_trip_is_every_percentile() -> None:
    assert [percentile([7.0], percent) for percent in (50, 99, 100)] == [7.0] * 3


def test_every_chain_has_a_row_for_every_load_and_number_of_connections() -> None:
    for chain in CHAINS:
        titles = [
            load.row.title for load in chosen_loads(chain, Settings(connections=(1, 4)), Path("source"))
        ]
        assert len(set(titles)) == len(titles) == 2 + 2 * len(RANDOM)
        assert "4 KiB random write, depth 16, 4 connections" in titles


def test_only_loads_with_the_given_text_are_chosen() -> None:
    settings = Settings(connections=(1,), loads=("nbdcopy", "depth 64"))
    assert [load.row.title for load in chosen_loads(RAW, settings, Path("source"))] == [
        "nbdcopy, read whole disk",
        "nbdcopy, write whole disk",
        "4 KiB random read, depth 64",
        "4 KiB random write, depth 64",
    ]


def test_the_monitor_is_measured_during_loads_of_the_table() -> None:
    titles = [random_title(load, 1) for load, _ in RANDOM]
    assert all(random_title(load, 1) in titles for load in SATURATING)


def test_the_aims_for_throughput_are_about_all_formats_but_the_plain_one() -> None:
    with_aims = {
        chain.name
        for chain in CHAINS
        if any(load.row.aims for load in chosen_loads(chain, Settings(), Path("source")))
    }
    assert with_aims == {chain.name for chain in CHAINS} - {"raw"}


def test_a_chain_is_served_by_each_program_in_its_own_words(tmp_path: Path) -> None:
    image = tmp_path / "image"
    nbdkit = NbdServer(Program("nbdkit", ("nbdkit",)), LUKS, image, tmp_path).command()
    assert nbdkit is not None
    assert nbdkit[-4:] == ["--filter=luks", "file", str(image), f"passphrase={PASSPHRASE}"]
    daemon = NbdServer(Program("qmpd", ("qmpd",)), LUKS, image, tmp_path).command()
    assert daemon is not None
    assert json.loads(daemon[daemon.index("--blockdev") + 1]) == {
        "driver": "luks",
        "node-name": "disk",
        "key-secret": "passphrase",
        "file": {"driver": "file", "filename": str(image)},
    }


def test_names_of_files_are_put_in_at_any_depth() -> None:
    assert filled({"a": ("{image}", {"b": "x={source}"})}, image="i", source="s") == {
        "a": ["i", {"b": "x=s"}]
    }


def test_random_loads_say_their_depth_and_connections_to_fio() -> None:
    words = RandomLoad("write", 4096, 16).fio("nbd+unix:///?socket=s", 4, 0.5)
    assert {"--rw=randwrite", "--bs=4096", "--iodepth=16", "--numjobs=4", "--runtime=500ms"} <= set(words)


def test_a_table_replaces_what_is_between_its_comments_and_nothing_else() -> None:
    end = "<!-- bench: end -->"
    text = f"a\n<!-- bench: x -->\n\nold\n\n{end}\nb\n<!-- bench: y -->\nkept\n{end}\n"
    written = replaced(text, "x", r"new \1")
    assert written == text.replace("old", r"new \1")
    assert replaced(written, "x", "old") == text
    with pytest.raises(ValueError, match="0 places are called 'z'"):
        replaced(text, "z", "")


def test_the_documents_have_the_places_that_a_run_writes_to() -> None:
    places = ((README, "monitor"), (PERFORMANCE, "aims"))
    places += tuple((BENCHMARKS, name) for name in ("start", "data path", "unlock", "sectors"))
    for path, name in places:
        assert "figures" in replaced(path.read_text(), name, "figures")


@pytest.mark.timeout(300)  # seconds on an idle machine; it starts some sixty processes
@pytest.mark.peer("qemu-storage-daemon", "qemu-img", "nbdkit", "nbdcopy", "fio")
def test_every_program_serves_every_chain_to_every_kind_of_load(tmp_path: Path) -> None:
    """With a small disk, and a moment for each figure."""
    arguments = ("--only", "data-path", "--quick", "--size", "8", "--seconds", "0.1", "--connections", "4")
    loads = ("--load", "nbdcopy", "256 KiB random read", "memory")
    ended = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, *loads, "--directory", str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert "What failed" not in ended.stdout, ended.stdout
    tables = re.split(r"^### ", ended.stdout, flags=re.MULTILINE)[1:]
    assert [table.splitlines()[0] for table in tables] == [chain.title for chain in CHAINS]
    for chain, table in zip(CHAINS, tables, strict=True):
        rows = {
            cells[1]: cells[2:7]
            for line in table.splitlines()
            if len(cells := re.split(r" *\| *", line)) == 8
        }
        for title in (
            "nbdcopy, read whole disk (MB/s)",
            "nbdcopy, write whole disk (MB/s)",
            "256 KiB random read, depth 8, 4 connections (MB/s)",
            *(["resident memory at its peak in all these loads (MB)"] if not chain.fresh else []),
        ):
            figures = rows[title] if chain.nbdkit is not None else rows[title][:3:2]
            assert all(figures), f"{title}: {rows[title]}"
        latencies = [
            cells for title, cells in rows.items() if title.startswith("`query-version` during 256 KiB")
        ]
        assert len(latencies) == 3
        assert all(storage_daemon and ours for storage_daemon, _, ours, *_ in latencies)
    assert list(tmp_path.iterdir()) == []
