"""Cutting the command line into options, as getopt_long does it."""

from __future__ import annotations

import pytest

from qmpd.cli.options import STORAGE_DAEMON_OPTIONS, Option, OptionError, naming, scan
from qmpd.errors import Error


@pytest.mark.parametrize(
    ("arguments", "name", "value", "text"),
    [
        (["--object", "secret,id=a"], "object", "secret,id=a", "--object secret,id=a"),
        (["--object=secret,id=a"], "object", "secret,id=a", "--object=secret,id=a"),
        (["--object="], "object", "", "--object="),
        (["--obj", "secret"], "object", "secret", "--obj secret"),
        (["--block=driver=raw"], "blockdev", "driver=raw", "--block=driver=raw"),
        (["--pidfile", "--version"], "pidfile", "--version", "--pidfile --version"),
        (["--daemonize"], "daemonize", "", "--daemonize"),
        (["-h"], "help", "", "-h"),
        (["-V"], "version", "", "-V"),
        (["-T", "x"], "trace", "x", "-T x"),
        (["-Tx"], "trace", "x", "-Tx"),
        (["foo"], "", "foo", "foo"),
        (["-"], "", "-", "-"),
        ([""], "", "", ""),
        (["--device", "d"], "device", "d", "--device d"),
        (["--qmp", "stdio"], "qmp", "stdio", "--qmp stdio"),
    ],
)
def test_every_way_to_write_an_option_is_read(arguments: list[str], name: str, value: str, text: str) -> None:
    assert list(scan(arguments)) == [Option(name, value, text)]


def test_short_options_may_be_clustered() -> None:
    assert [option.name for option in scan(["-hVTx"])] == ["help", "version", "trace"]


def test_the_order_is_kept() -> None:
    options = scan(["--object", "a", "--blockdev=b", "--object", "c"])
    assert [(option.name, option.value) for option in options] == [
        ("object", "a"),
        ("blockdev", "b"),
        ("object", "c"),
    ]


def test_what_follows_two_dashes_is_ignored() -> None:
    assert list(scan(["--daemonize", "--", "foo", "--frobnicate"])) == [
        Option("daemonize", "", "--daemonize")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized option '--frobnicate'"),
        (["--frob=3"], "unrecognized option '--frob=3'"),
        (["---"], "unrecognized option '---'"),
        (["--object"], "option '--object' requires an argument"),
        (["--obj"], "option '--object' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
        (["--vers=1"], "option '--version' doesn't allow an argument"),
        (["-x"], "invalid option -- 'x'"),
        (["-xV"], "invalid option -- 'x'"),
        (["-T"], "option requires an argument -- 'T'"),
        (["--lo", "x"], "option '--lo' is ambiguous; possibilities: '--log' '--loop'"),
        (
            ["--=x"],
            "option '--=x' is ambiguous; possibilities: "
            + " ".join(f"'--{name}'" for name in STORAGE_DAEMON_OPTIONS),
        ),
    ],
)
def test_a_wrong_option_is_refused_in_glibcs_words(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        list(scan(arguments))
    assert str(refusal.value) == message


@pytest.mark.parametrize("name", STORAGE_DAEMON_OPTIONS)
def test_an_abbreviation_that_qemu_storage_daemon_takes_means_the_same_here(name: str) -> None:
    """Our own options must not make an existing script's abbreviations ambiguous."""
    for length in range(1, len(name) + 1):
        written = name[:length]
        assert sum(other.startswith(written) for other in STORAGE_DAEMON_OPTIONS) == 1
        argument = f"--{written}=x" if STORAGE_DAEMON_OPTIONS[name] else f"--{written}"
        assert [option.name for option in scan([argument])] == [name]


def test_options_before_a_wrong_one_are_seen() -> None:
    options = scan(["--version", "--frobnicate"])
    assert next(options).name == "version"
    with pytest.raises(OptionError):
        next(options)


def test_an_error_names_the_option_as_it_was_written() -> None:
    with pytest.raises(Error) as refusal, naming(Option("object", "x", "--obj x")):
        raise Error("is wrong")
    assert refusal.value.desc == "--obj x: is wrong"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("secret,id=s,data=hunter2,format=rot13", "Parameter 'format' does not accept value 'rot13'"),
        ("secret,id=s,data=hun,ter2", "Expected '=' after parameter 'ter2'"),
        ('{"qom-type": "secret", "id": "s", "data": "hunter2", "x": 1}', "Parameter 'x' is unexpected"),
        ('{"qom-type": "secret", "data": "hunter2', "JSON parse error, stray '\"hunter2'"),
    ],
)
def test_no_part_of_a_passphrase_is_in_an_error(value: str, error: str) -> None:
    option = Option("object", value, f"--object {value}")
    with pytest.raises(Error) as caught, naming(option):
        raise Error(error)
    assert caught.value.desc.startswith("--object ")
    for part in ("hunter2", "hun", "ter2"):
        assert part not in caught.value.desc
