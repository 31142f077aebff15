"""From options to what they ask of a daemon."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest

from qmpd.cli.options import Answered, scan
from qmpd.cli.start import Start
from qmpd.cli.systemd import PassedSocket
from qmpd.daemon import Daemon
from qmpd.errors import Error
from qmpd.monitor.chardev import ChardevConfig
from qmpd.qapi import load, schema_directory


class RecordingDaemon:
    """A daemon that only remembers what it was asked for."""

    def __init__(self) -> None:
        self.schema = load(schema_directory())
        self.asked: list[tuple[Any, ...]] = []

    async def add_object(self, options: dict[str, Any]) -> None:
        self.asked.append(("object", options))

    async def add_blockdev(self, options: dict[str, Any]) -> None:
        self.asked.append(("blockdev", options))

    async def add_device(self, options: dict[str, Any], *, written: bool) -> None:
        self.asked.append(("device", options))

    def export_devices(self, wanted: bool) -> None:
        self.asked.append(("device-exports", wanted))

    async def start_nbd_server(self, options: dict[str, Any]) -> None:
        self.asked.append(("nbd-server", options))

    async def add_export(self, options: dict[str, Any]) -> None:
        self.asked.append(("export", options))

    async def add_chardev(self, config: ChardevConfig) -> None:
        self.asked.append(("chardev", config))

    async def add_monitor(self, chardev_id: str, pretty: bool = False) -> None:
        self.asked.append(("monitor", chardev_id, pretty))


@pytest.fixture
def daemon() -> RecordingDaemon:
    return RecordingDaemon()


async def start(
    daemon: RecordingDaemon, *arguments: str, daemonize: bool = False, sockets: tuple[PassedSocket, ...] = ()
) -> list[tuple[Any, ...]]:
    await Start(cast("Daemon", daemon), daemonize).run(list(scan(arguments)), sockets)
    return daemon.asked


async def test_everything_is_made_in_the_order_given(daemon: RecordingDaemon) -> None:
    asked = await start(
        daemon,
        "--device=virtio-blk-pci,drive=n,num-queues=1,id=d",
        "--blockdev=null-co,node-name=n,size=1024,read-only=on",
        "--object",
        "secret,id=s,data=a,,b",
        "--chardev",
        "socket,id=m,path=/s,server=on,wait=off",
        "--monitor",
        "m,pretty=on",
    )
    assert asked == [
        ("device", {"driver": "virtio-blk-pci", "drive": "n", "num-queues": "1", "id": "d"}),
        ("blockdev", {"driver": "null-co", "node-name": "n", "size": 1024, "read-only": True}),
        ("object", {"qom-type": "secret", "id": "s", "data": "a,b"}),
        ("chardev", ChardevConfig(id="m", kind="socket", path="/s", server=True, wait=False)),
        ("monitor", "m", True),
    ]


async def test_json_is_taken_wherever_the_schema_knows_the_type(daemon: RecordingDaemon) -> None:
    asked = await start(
        daemon,
        "--object",
        '{"qom-type": "secret", "id": "s", "data": "a,b"}',
        "--blockdev",
        "{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'file', 'filename': 'f'}}",
        "--device",
        '{"driver": "virtio-blk-pci", "drive": "r", "num-queues": 1}',
        "--monitor",
        '{"chardev": "m", "mode": "control"}',
    )
    assert asked == [
        ("object", {"qom-type": "secret", "id": "s", "data": "a,b"}),
        ("blockdev", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "f"}}),
        ("device", {"driver": "virtio-blk-pci", "drive": "r", "num-queues": 1}),
        ("monitor", "m", False),
    ]


async def test_exports_and_their_server_take_both_spellings(daemon: RecordingDaemon) -> None:
    address = {"type": "unix", "path": "s"}
    export = {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
    asked = await start(
        daemon,
        "--nbd-server",
        "addr.type=unix,addr.path=s,max-connections=3",
        "--nbd-server",
        '{"addr": {"type": "unix", "path": "s"}}',
        "--export",
        "nbd,id=e,node-name=n,writable=on",
        "--export",
        '{"type": "nbd", "id": "e", "node-name": "n", "writable": true}',
        "--device-exports",
        "on",
        "--device-exports=off",
    )
    assert asked == [
        ("nbd-server", {"addr": address, "max-connections": 3}),
        ("nbd-server", {"addr": address}),
        ("export", export),
        ("export", export),
        ("device-exports", True),
        ("device-exports", False),
    ]


async def test_an_nbd_socket_keeps_its_place_when_the_working_directory_changes(
    daemon: RecordingDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/tmp")
    ((_, options),) = await start(daemon, "--nbd-server", "addr.type=unix,addr.path=s", daemonize=True)
    assert options["addr"]["path"] == "/tmp/s"


async def test_a_monitor_may_be_one_option(daemon: RecordingDaemon) -> None:
    asked = await start(daemon, "--qmp", "unix:/s,server,nowait", "--qmp", "stdio")
    assert asked == [
        ("chardev", ChardevConfig(id="compat_monitor0", kind="socket", path="/s", server=True, wait=False)),
        ("monitor", "compat_monitor0", False),
        ("chardev", ChardevConfig(id="compat_monitor1", kind="stdio")),
        ("monitor", "compat_monitor1", False),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blockdev", "driver=nope,node-name=n"], "Parameter 'driver' does not accept value 'nope'"),
        (["--blockdev", ""], "Parameter 'driver' is missing"),
        (["--blockdev", "null-co,node-name=a,size=1k"], "Parameter 'size' expects integer"),
        (["--blockdev", '{"driver":"null-co", bad}'], "JSON parse error, invalid keyword 'bad'"),
        (["--blockdev", '{"driver":"null-co"'], "JSON parse error, premature EOI"),
        (["--blockdev", '{"driver":"null-co"} x'], "Expecting at most one JSON value"),
        (["--blockdev", "help"], "Help is not available for this option"),
        (["--blockdev", "null-co,node-name=a,size"], "Expected '=' after parameter 'size'"),
        (["--object", "secret,format=raw"], "Parameter 'id' is missing"),
        (["--object=nope,id=a"], "Parameter 'qom-type' does not accept value 'nope'"),
        (["--obj", "secret,id=a,file=x,foo=y"], "Parameter 'foo' is unexpected"),
        (["--monitor", "mode=control"], "Parameter 'chardev' is missing"),
        (["--monitor", "m,pretty"], "Expected '=' after parameter 'pretty'"),
        (["--monitor", "m,mode=foo"], "Parameter 'mode' does not accept value 'foo'"),
        (["--monitor", "m,mode=readline"], "Only QMP is supported"),
        (["--device", ""], "Parameter 'driver' is missing"),
        (["--device", "virtio-blk-pci,id=3"], "Parameter 'id' expects an identifier"),
        (["--device", '{"driver": x}'], "JSON parse error, invalid keyword 'x'"),
        (["--chardev", "nope,id=a"], "'nope' is not a valid char driver name"),
        (["foo"], "Unexpected argument"),
        (["--export", "nbd,id=e"], "Parameter 'node-name' is missing"),
        (["--export", "fuse,id=e"], "Parameter 'type' does not accept value 'fuse'"),
        (["--nbd-server", "addr.type=unix"], "Parameter 'addr.path' is missing"),
        (["--nbd-server", "foo"], "Expected '=' after parameter 'foo'"),
        (["--device-exports", "maybe"], "'maybe' is none of on, off"),
        (["--trace", "foo=bar"], "Invalid parameter 'foo'"),
    ],
)
async def test_what_is_wrong_is_said_in_qemus_words_after_the_option(
    daemon: RecordingDaemon, arguments: list[str], message: str
) -> None:
    with pytest.raises(Error) as refusal:
        await start(daemon, *arguments)
    assert refusal.value.desc == f"{' '.join(arguments)}: {message}"


@pytest.mark.parametrize("question", ["help", "?", "nope,help"])
async def test_the_object_types_can_be_asked_for(daemon: RecordingDaemon, question: str) -> None:
    with pytest.raises(Answered) as answer:
        await start(daemon, "--object", question)
    assert str(answer.value).splitlines()[0] == "List of user creatable objects:"
    assert "  secret" in str(answer.value).splitlines()


async def test_an_object_types_properties_can_be_asked_for(daemon: RecordingDaemon) -> None:
    with pytest.raises(Answered) as answer:
        await start(daemon, "--object", "secret,help")
    assert str(answer.value).splitlines() == [
        "secret options:",
        "  data=<string>",
        "  file=<string>",
        "  format=<QCryptoSecretFormat>",
        "  iv=<string>",
        "  keyid=<string>",
    ]


async def test_the_kinds_of_character_devices_can_be_asked_for(daemon: RecordingDaemon) -> None:
    with pytest.raises(Answered) as answer:
        await start(daemon, "--chardev", "help")
    assert str(answer.value).splitlines() == [
        "Available chardev backend types:",
        "  null",
        "  ringbuf",
        "  socket",
        "  stdio",
    ]


async def test_an_unknown_trace_event_is_a_warning(
    daemon: RecordingDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    await start(daemon, "-T", "foo")
    assert capsys.readouterr().err == "qmpd: -T foo: warning: trace event 'foo' does not exist\n"


async def test_stdio_and_the_background_exclude_each_other(daemon: RecordingDaemon) -> None:
    with pytest.raises(Error, match="cannot use stdio with -daemonize"):
        await start(daemon, "--chardev", "stdio,id=a", daemonize=True)


async def test_a_socket_keeps_its_place_when_the_working_directory_changes(
    daemon: RecordingDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/tmp")
    ((_, config),) = await start(daemon, "--chardev", "socket,id=a,path=s,server=on,wait=off", daemonize=True)
    assert config.path == "/tmp/s"


async def test_sockets_from_systemd_become_monitors(daemon: RecordingDaemon) -> None:
    asked = await start(
        daemon, sockets=(PassedSocket(3, "qmpd"), PassedSocket(4, "qmpd"), PassedSocket(5, "no id"))
    )
    assert [(entry[1].id, entry[1].fd) for entry in asked if entry[0] == "chardev"] == [
        ("qmpd", 3),
        ("systemd1", 4),
        ("systemd2", 5),
    ]
    assert [entry[1] for entry in asked if entry[0] == "monitor"] == ["qmpd", "systemd1", "systemd2"]


async def test_a_socket_that_an_option_takes_is_not_served_twice(daemon: RecordingDaemon) -> None:
    with socket.socket() as listening:
        number = listening.fileno()
        asked = await start(
            daemon,
            "--chardev",
            f"socket,id=m,fd={number},server=on,wait=off",
            sockets=(PassedSocket(number, "qmpd"),),
        )
    assert [entry[0] for entry in asked] == ["chardev"]
