"""Character devices.  Names and errors are those that were seen in qemu-storage-daemon 10.0.2."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat

import pytest

from qmpd.errors import Error
from qmpd.monitor.chardev import ChardevConfig, Chardevs


class Echo(asyncio.Protocol):
    """Says hello, and everything that it is told."""

    def connection_made(self, transport):
        self.transport = transport
        transport.write(b"hello\n")

    def data_received(self, data):
        self.transport.write(data)


@pytest.fixture
async def announced():
    return []


@pytest.fixture
async def chardevs(announced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    all_of_them = Chardevs(announced.append)
    yield all_of_them
    await all_of_them.close()


def server(**members):
    return ChardevConfig(id="m", server=True, wait=False, **members)


async def hello(reader):
    return await asyncio.wait_for(reader.readline(), 10)


async def test_a_unix_socket_serves_any_number_of_clients(chardevs):
    chardev = await chardevs.add(server(path="qmp.sock"))
    assert chardev.info() == {
        "frontend-open": False,
        "filename": "disconnected:unix:qmp.sock,server=on",
        "label": "m",
    }
    await chardev.attach(Echo)
    assert chardev.filename() == "disconnected:unix:qmp.sock,server=on"
    assert chardev.info()["frontend-open"] is True
    clients = [await asyncio.open_unix_connection("qmp.sock") for _ in range(5)]
    for reader, writer in clients:
        assert await hello(reader) == b"hello\n"
        writer.write(b"a\n")
        assert await hello(reader) == b"a\n"
    assert chardevs.query()[0]["filename"] == "unix:qmp.sock,server=on"
    for _, writer in clients:
        writer.close()


async def test_the_socket_is_the_owner_s_alone_unless_another_mode_is_asked_for(chardevs):
    previous = os.umask(0)
    try:
        await chardevs.add(server(path="closed"))
        await chardevs.add(ChardevConfig(id="n", path="open", server=True, wait=False, mode=0o660))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat("closed").st_mode) == 0o600
    assert stat.S_IMODE(os.stat("open").st_mode) == 0o660


async def test_the_umask_does_not_narrow_the_mode_that_was_asked_for(chardevs):
    previous = os.umask(0o077)
    try:
        await chardevs.add(server(path="open", mode=0o666))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat("open").st_mode) == 0o666


async def test_the_socket_is_never_there_with_a_wider_mode(chardevs, monkeypatch):
    seen = []
    bind = socket.socket.bind

    def watched(self, address):
        bind(self, address)
        seen.append(stat.S_IMODE(os.stat(address).st_mode))

    monkeypatch.setattr(socket.socket, "bind", watched)
    previous = os.umask(0)
    try:
        await chardevs.add(server(path="open", mode=0o666))
    finally:
        os.umask(previous)
    assert seen == [0o600]


async def test_a_group_by_name_or_number_owns_the_socket(chardevs):
    await chardevs.add(server(path="grouped", mode=0o660, group=str(os.getegid())))
    assert os.stat("grouped").st_gid == os.getegid()
    with pytest.raises(Error, match="There is no group 'no-such-group'"):
        await chardevs.add(ChardevConfig(id="n", path="x", server=True, wait=False, group="no-such-group"))


async def test_a_stale_socket_and_an_empty_file_are_replaced(chardevs):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind("stale")
    open("empty", "w").close()
    await chardevs.add(server(path="stale"))
    await chardevs.add(ChardevConfig(id="n", path="empty", server=True, wait=False))
    for path in ("stale", "empty"):
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()


async def test_a_file_with_contents_and_a_directory_are_not_replaced(chardevs, tmp_path):
    (tmp_path / "image").write_text("precious")
    (tmp_path / "directory").mkdir()
    with pytest.raises(Error, match="Failed to bind socket to image: there is a file that is not empty"):
        await chardevs.add(server(path="image"))
    with pytest.raises(Error, match="Failed to unlink socket directory: Is a directory"):
        await chardevs.add(server(path="directory"))
    assert (tmp_path / "image").read_text() == "precious"


async def test_the_socket_is_removed_at_the_end_unless_somebody_replaced_it(chardevs, tmp_path):
    await chardevs.add(server(path="ours"))
    await chardevs.add(ChardevConfig(id="n", path="replaced", server=True, wait=False))
    os.unlink("replaced")
    (tmp_path / "replaced").write_text("theirs")
    await chardevs.close()
    assert os.listdir(".") == ["replaced"]


async def test_an_abstract_socket_has_no_file(chardevs):
    name = f"qmpd-test-{os.getpid()}"
    chardev = await chardevs.add(server(path="\0" + name))
    await chardev.attach(Echo)
    assert chardev.filename() == f"disconnected:unix:{name},abstract=on,tight=on,server=on"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + name)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    assert await hello(reader) == b"hello\n"
    writer.close()


async def test_tcp_shows_its_port_and_who_is_connected(chardevs):
    chardev = await chardevs.add(server(host="127.0.0.1", port="0"))
    await chardev.attach(Echo)
    port = re.fullmatch(r"disconnected:tcp:127\.0\.0\.1:(\d+),server=on", chardev.filename())[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    assert await hello(reader) == b"hello\n"
    here = writer.get_extra_info("sockname")[1]
    assert chardev.filename() == f"tcp:127.0.0.1:{port},server=on <-> 127.0.0.1:{here}"
    writer.close()


async def test_client_mode_connects(chardevs):
    greeted = asyncio.get_running_loop().create_future()

    async def accepted(reader, writer):
        greeted.set_result(await reader.readline())
        writer.close()

    listening = await asyncio.start_unix_server(accepted, "peer")
    chardev = await chardevs.add(ChardevConfig(id="m", path="peer"))
    assert chardev.filename() == "disconnected:unix:peer"
    await chardev.attach(Echo)
    assert chardev.filename() == "unix:peer"
    assert await asyncio.wait_for(greeted, 10) == b"hello\n"
    listening.close()


async def test_a_passed_listening_socket_is_served_and_its_file_left_alone(chardevs):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("passed")
    listener.listen()
    chardev = await chardevs.add(server(fd=listener.detach()))
    await chardev.attach(Echo)
    assert chardev.filename() == "disconnected:unix:passed,server=on"
    reader, writer = await asyncio.open_unix_connection("passed")
    assert await hello(reader) == b"hello\n"
    writer.close()
    await chardevs.close()
    assert os.path.exists("passed")


async def test_a_passed_connected_socket_is_served(chardevs):
    here, there = socket.socketpair()
    chardev = await chardevs.add(ChardevConfig(id="m", fd=there.detach()))
    await chardev.attach(Echo)
    assert chardev.filename() == "unix:"
    reader, writer = await asyncio.open_unix_connection(sock=here)
    assert await hello(reader) == b"hello\n"
    writer.close()


async def test_with_wait_nothing_goes_on_until_a_client_is_there(chardevs, announced):
    opening = asyncio.create_task(chardevs.add(ChardevConfig(id="m", path="waiting", server=True, wait=True)))
    await asyncio.sleep(0.02)
    assert announced == ["info: QEMU waiting for connection on: disconnected:unix:waiting,server=on"]
    assert not opening.done()
    reader, writer = await asyncio.open_unix_connection("waiting")
    chardev = await asyncio.wait_for(opening, 10)
    await chardev.attach(Echo)
    assert await hello(reader) == b"hello\n"
    second, second_writer = await asyncio.open_unix_connection("waiting")
    assert await hello(second) == b"hello\n"
    writer.close()
    second_writer.close()


@pytest.mark.parametrize(
    ("config", "desc"),
    [
        (server(path="no/x"), "Failed to bind socket to no/x: No such file or directory"),
        (
            server(path="x" * 109),
            f"UNIX socket path '{'x' * 109}' is too long\nPath must be less than 108 bytes",
        ),
        (ChardevConfig(id="m", path="nothing"), "Failed to connect to 'nothing': No such file or directory"),
        (server(fd=1000), "File descriptor '1000' is not a socket"),
        (
            server(host="127.0.0.1", port="no"),
            "address resolution failed for 127.0.0.1:no: Servname not supported for ai_socktype",
        ),
        (ChardevConfig(id="m", kind="pty"), "'pty' is not a valid char driver name"),
        (server(path="x", users=("no-such-user",)), "There is no user 'no-such-user'"),
        (
            server(host="127.0.0.1", port="0", users=("0",)),
            "'users' and 'groups' need a UNIX socket: TCP does not tell who a client is",
        ),
    ],
)
async def test_what_can_t_be_opened_is_refused_and_leaves_nothing_behind(chardevs, config, desc):
    with pytest.raises(Error) as caught:
        await chardevs.add(config)
    assert caught.value.desc == desc
    assert os.listdir(".") == []
    assert chardevs.query() == []


async def test_a_port_in_use_is_refused(chardevs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Error, match="Failed to find an available port: Address already in use"):
            await chardevs.add(server(host="127.0.0.1", port=str(port)))


async def test_nobody_listening_on_a_port_is_told(chardevs):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(Error, match=f"Failed to connect to '127.0.0.1:{port}': Connection refused"):
        await chardevs.add(ChardevConfig(id="m", host="127.0.0.1", port=str(port)))


async def test_ids_are_unique_and_a_chardev_serves_one_monitor(chardevs):
    chardev = await chardevs.add(server(path="a"))
    with pytest.raises(Error, match="Chardev with id 'm' already exists"):
        await chardevs.add(server(path="b"))
    await chardev.attach(Echo)
    with pytest.raises(Error, match="chardev 'm' is already in use"):
        await chardev.attach(Echo)
    assert chardevs.find("m") is chardev
    with pytest.raises(Error, match='chardev "x" not found'):
        chardevs.find("x")


async def test_there_is_one_standard_input(chardevs):
    chardev = await chardevs.add(ChardevConfig(id="s", kind="stdio"))
    assert chardev.info() == {"frontend-open": False, "filename": "stdio", "label": "s"}
    with pytest.raises(Error, match="cannot use stdio by multiple character devices"):
        await chardevs.add(ChardevConfig(id="t", kind="stdio"))
