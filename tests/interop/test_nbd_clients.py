"""Other people's NBD clients on exports of plain and encrypted nodes."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nbd_served import SIZE, Served

DISK = 8 << 20
EVERYTHING = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")


def execute(*command: str, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=100)
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest_asyncio.fixture(params=["raw", "luks", "raw over TCP"])
async def disk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    """The export "disk" of a node whose driver is the parameter, with the same bytes in `plain`.

    "depth" is the same node with the metadata context of its allocation depth.
    """
    served = Served(tmp_path)
    if "TCP" in request.param:
        served.address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    await served.start()
    plain = tmp_path / "plain"
    plain.write_bytes((os.urandom(1 << 16) + bytes(1 << 16)) * (DISK >> 17))
    image = tmp_path / "disk.img"
    file = {"driver": "file", "filename": str(image)}
    if request.param == "luks":
        target = "driver=luks,key-secret=pw,file.filename=" + str(image)
        secret = ("--object", "secret,id=pw,data=pw")
        options = "key-secret=pw,iter-time=10"
        execute("qemu-img", "create", "-q", *secret, "-f", "luks", "-o", options, str(image), str(DISK))
        source = f"driver=raw,file.filename={plain}"
        execute("qemu-img", "convert", "-n", *secret, "--image-opts", source, "--target-image-opts", target)
        await served.graph.add({"node-name": "d", "driver": "luks", "key-secret": "pw", "file": file})
    else:
        image.write_bytes(plain.read_bytes())
        await served.graph.add({"node-name": "d", "driver": "raw", "file": file, "discard": "unmap"})
    served.add("e-d", "d", name="disk", writable=True, description="under test")
    served.add("e-depth", "d", name="depth", allocation_depth=True)
    yield served
    await served.exports.close()
    await served.graph.close()


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    await served.start()
    yield served
    await served.exports.close()
    await served.graph.close()


def uri(served: Served, name: str = "disk") -> str:
    server = served.exports.nbd_server
    assert server is not None
    (address,) = server.addresses
    if isinstance(address, tuple):
        return f"nbd://{address[0]}:{address[1]}/{name}"
    return f"nbd+unix:///{name}?socket={address}"


def plain(served: Served) -> Path:
    return served.image.with_name("plain")


@pytest.mark.peer("nbdinfo", "qemu-img")
async def test_nbdinfo_sees_what_the_export_can(disk: Served) -> None:
    info = json.loads(await disk.run(lambda: execute("nbdinfo", "--json", uri(disk))))
    (export,) = info["exports"]
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"] is True
    assert export["description"] == "under test"
    assert export["export-size"] == DISK
    assert export["contexts"] == ["base:allocation"]
    can = {name for name, value in export.items() if name.startswith("can_") and value}
    assert can == {f"can_{what}" for what in EVERYTHING}
    listed = json.loads(await disk.run(lambda: execute("nbdinfo", "--list", "--json", uri(disk, ""))))
    assert [one["export-name"] for one in listed["exports"]] == ["f", "ro", "n", "disk", "depth"]
    (deep,) = json.loads(await disk.run(lambda: execute("nbdinfo", "--json", uri(disk, "depth"))))["exports"]
    assert deep["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    extents = json.loads(await disk.run(lambda: execute("nbdinfo", "--json", "--map", uri(disk))))
    assert sum(one["length"] for one in extents) == DISK


@pytest.mark.peer("nbd-client", "qemu-img")
async def test_nbd_client_lists_the_exports(disk: Served) -> None:
    """It can do no more without the kernel's module, and needs TCP."""
    server = disk.exports.nbd_server
    assert server is not None
    (address,) = server.addresses
    where = ("127.0.0.1", str(address[1])) if isinstance(address, tuple) else ("-unix", address)
    listed = await disk.run(lambda: execute("nbd-client", "-l", *where))
    assert {"f", "ro", "n", "disk: under test", "depth"} <= set(listed.splitlines()), listed


@pytest.mark.peer("nbdcopy", "qemu-img")
async def test_nbdcopy_copies_both_ways(disk: Served, tmp_path: Path) -> None:
    copied, random = tmp_path / "copied", tmp_path / "random"
    await disk.run(lambda: execute("nbdcopy", uri(disk), str(copied)))
    assert copied.read_bytes() == plain(disk).read_bytes()
    random.write_bytes(os.urandom(DISK - (1 << 20)) + bytes(1 << 20))
    await disk.run(lambda: execute("nbdcopy", "--flush", str(random), uri(disk)))
    await disk.run(lambda: execute("nbdcopy", uri(disk), str(copied)))
    assert copied.read_bytes() == random.read_bytes()


@pytest.mark.peer("qemu-img")
async def test_qemu_img_reads_maps_compares_and_writes(disk: Served, tmp_path: Path) -> None:
    def client() -> None:
        info = json.loads(execute("qemu-img", "info", "--output=json", uri(disk)))
        assert info["virtual-size"] == DISK
        extents = json.loads(execute("qemu-img", "map", "--output=json", uri(disk)))
        assert sum(one["length"] for one in extents) == DISK
        execute("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(disk), str(plain(disk)))
        copied, random = tmp_path / "copied", tmp_path / "random"
        execute("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(disk), str(copied))
        assert copied.read_bytes() == plain(disk).read_bytes()
        random.write_bytes(os.urandom(1 << 20) + bytes(DISK - (1 << 20)))
        execute("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(random), uri(disk))
        execute("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(disk), str(random))
        execute("qemu-img", "bench", "-f", "raw", "-c", "200", "-d", "16", "-w", uri(disk))

    await disk.run(client)


@pytest.mark.peer("qemu-io", "qemu-img")
async def test_qemu_io_finds_what_it_wrote(disk: Served) -> None:
    commands = ["write -P 7 3 4093", "write -z 64k 64k", "discard 128k 64k", "flush", "write -f -P 9 1M 1M"]
    checks = ["read -P 7 3 4093", "read -P 0 64k 64k", "read -P 9 1M 1M"]

    def client() -> str:
        every = [part for command in commands + checks for part in ("-c", command)]
        return execute("qemu-io", "-f", "raw", *every, uri(disk))

    output = await disk.run(client)
    assert "failed" not in output


@pytest.mark.peer("fio", "qemu-img")
async def test_fio_verifies_what_it_wrote(disk: Served, tmp_path: Path) -> None:
    await disk.run(
        lambda: execute(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri(disk)}", f"--size={DISK}"),
            *("--rw=randrw", "--bsrange=512-256k", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1"),
            cwd=tmp_path,
        )
    )


LIBNBD = """
import errno, sys, nbd
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
size = h.get_size()
assert h.get_structured_replies_negotiated() and h.can_multi_conn()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20

def fails(number, function, *arguments):
    try:
        function(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, function, arguments)
    else:
        raise AssertionError((function, arguments))

h.pwrite(b"a" * 65536, 512)
h.pwrite(b"b" * 512, 1024, nbd.CMD_FLAG_FUA)
assert h.pread(2048, 0) == h.pread(512, 0) + b"a" * 512 + b"b" * 512 + b"a" * 512
assert h.pread(65536, 512, nbd.CMD_FLAG_DF) == b"a" * 512 + b"b" * 512 + b"a" * 64512
pieces = []
h.pread_structured(4 << 20, 0, lambda data, offset, status, error: pieces.append((offset, len(data))))
assert sum(length for _, length in pieces) == 4 << 20
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(8192, 4096)
assert h.pread(8192, 4096) == bytes(8192)
try:
    h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as error:
    assert error.errnum == errno.ENOTSUP
h.trim(65536, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(size, 0)
h.flush()
runs = []
def status(context, offset, entries, error):
    assert context == nbd.CONTEXT_BASE_ALLOCATION
    runs.extend(zip(entries[0::2], entries[1::2]))
h.block_status(size, 0, status)
assert sum(length for length, _ in runs) == size, runs
runs.clear()
h.block_status(size, 0, status, nbd.CMD_FLAG_REQ_ONE)
assert len(runs) == 1

fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pwrite, b"x" * 512, size - 256)
fails(errno.EINVAL, h.zero, 512, size)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.EINVAL, h.block_status, 512, size, status)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
h.pwrite(b"c", 3)
assert h.pread(1, 3) == b"c"

cookies = [h.aio_pwrite(bytes([number]) * 4096, number * 4096) for number in range(64)]
while h.aio_in_flight():
    h.poll(-1)
for number in range(64):
    assert h.pread(4096, number * 4096) == bytes([number]) * 4096
h.shutdown()

read_only = nbd.NBD()
read_only.set_strict_mode(0)
read_only.connect_uri(sys.argv[2])
assert read_only.is_read_only() and not read_only.can_trim()
fails(errno.EPERM, read_only.pwrite, b"x" * 512, 0)
fails(errno.EPERM, read_only.trim, 512, 0)
fails(errno.EPERM, read_only.zero, 512, 0)
read_only.shutdown()

deep = nbd.NBD()
deep.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
deep.add_meta_context("qemu:allocation-depth")
deep.connect_uri(sys.argv[3])
assert deep.can_meta_context("qemu:allocation-depth")
contexts = {}
def collect(context, offset, entries, error):
    contexts.setdefault(context, []).extend(zip(entries[0::2], entries[1::2]))
for flags in (0, nbd.CMD_FLAG_REQ_ONE):
    contexts.clear()
    deep.block_status(size, 0, collect, flags)
    assert set(contexts) == {nbd.CONTEXT_BASE_ALLOCATION, "qemu:allocation-depth"}
    if flags:
        assert all(len(runs) == 1 for runs in contexts.values()), contexts
    else:
        assert all(sum(length for length, _ in runs) == size for runs in contexts.values()), contexts
assert contexts["qemu:allocation-depth"][0][1] == 1
deep.shutdown()

for fixed, zeroes in ((True, True), (True, False), (False, False)):
    old = nbd.NBD()
    flags = nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE if fixed else 0
    old.set_handshake_flags(flags | (0 if zeroes else nbd.HANDSHAKE_FLAG_NO_ZEROES))
    old.connect_uri(sys.argv[1])
    assert old.get_protocol() == ("newstyle-fixed" if fixed else "newstyle")
    assert old.get_size() == size
    assert old.pread(4096, 4096) == bytes([1]) * 4096
    old.shutdown()

asking = nbd.NBD()
asking.set_opt_mode(True)
asking.set_full_info(True)
asking.add_meta_context("base:")
asking.connect_uri(sys.argv[1])
names = []
asking.opt_list(lambda name, description: names.append((name, description)))
assert ("disk", "under test") in names, names
found = []
asking.opt_list_meta_context(found.append)
assert found == ["base:allocation"], found
asking.set_export_name("nowhere")
fails(errno.ENOENT, asking.opt_info)
asking.set_export_name("disk")
asking.opt_info()
assert asking.get_size() == size
assert asking.get_export_description() == "under test"
fails(errno.ENOENT, (asking.set_export_name("nowhere"), asking.opt_go)[1])
asking.set_export_name("disk")
asking.opt_go()
assert asking.pread(4096, 4096) == bytes([1]) * 4096
asking.shutdown()
leaving = nbd.NBD()
leaving.set_opt_mode(True)
leaving.connect_uri(sys.argv[1])
leaving.opt_abort()
assert leaving.aio_is_closed()

# Every command again, a hundred at a time, and their completions in whatever order they come.
busy = nbd.NBD()
busy.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
busy.connect_uri(sys.argv[1])
extended = getattr(busy, "get_extended_headers_negotiated", None)
assert extended is None or extended(), "this libnbd can have extended headers"
done = []
def completed(error):
    done.append(error.value)
    return 1
status = lambda *_: 0
for turn in range(100):
    place = (1 << 20) + turn * 4096
    buffer = nbd.Buffer(4096)
    (
        lambda: busy.aio_pwrite(b"z" * 4096, place, completed, nbd.CMD_FLAG_FUA if turn % 20 == 0 else 0),
        lambda: busy.aio_pread(buffer, place, completed),
        lambda: busy.aio_pread_structured(buffer, place, lambda *_: 0, completed, nbd.CMD_FLAG_DF),
        lambda: busy.aio_zero(4096, place, completed, nbd.CMD_FLAG_NO_HOLE),
        lambda: busy.aio_trim(4096, place, completed),
        lambda: busy.aio_cache(4096, place, completed),
        lambda: busy.aio_flush(completed),
        lambda: busy.aio_block_status(1 << 20, place, status, completed, nbd.CMD_FLAG_REQ_ONE),
    )[turn % 8]()
while busy.aio_in_flight():
    busy.poll(-1)
assert done == [0] * 100, done
busy.shutdown()

plain = nbd.NBD()
plain.set_request_structured_replies(False)
plain.connect_uri(sys.argv[1])
assert not plain.get_structured_replies_negotiated()
assert plain.pread(4096, 4096) == bytes([1]) * 4096
plain.shutdown()
"""


@pytest.mark.peer("nbdsh", "qemu-img")
async def test_libnbd_may_use_every_command_and_flag(disk: Served) -> None:
    uris = [uri(disk), uri(disk, "ro"), uri(disk, "depth")]
    await disk.run(lambda: execute("/usr/bin/python3", "-c", LIBNBD, *uris))


@pytest.mark.peer("nbdsh", "qemu-img")
async def test_nbdsh_is_served(disk: Served) -> None:
    # The script of that name runs this with whichever python3 is the first on PATH.
    script = ("-c", "h.pwrite(b'shell' * 512, 512)", "-c", "print(h.pread(512, 512)[:5].decode())")
    assert (
        await disk.run(lambda: execute("/usr/bin/python3", "-m", "nbd", "-u", uri(disk), *script))
        == "shell\n"
    )


HOLES = """
import nbd, sys
kinds = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole"}
client = nbd.NBD()
client.connect_uri(sys.argv[1])
runs = []
def chunk(data, offset, kind, error):
    if runs and runs[-1][0] == kinds[kind]:
        runs[-1][2] = offset + len(data)
    else:
        runs.append([kinds[kind], offset, offset + len(data)])
contents = client.pread_structured(client.get_size(), 0, chunk)
print(runs)
assert contents == open(sys.argv[2], "rb").read()
client.shutdown()
"""


@pytest.mark.peer("nbdsh", "qemu-storage-daemon")
async def test_libnbd_is_told_of_the_same_holes_as_by_qemu(served: Served, tmp_path: Path) -> None:
    image, socket = tmp_path / "sparse", tmp_path / "qemu.sock"
    with image.open("wb") as file:
        file.truncate(DISK)
        for offset, length in ((1 << 20, 1 << 20), (5 << 20, 4096), (7 << 20, 1 << 16)):
            file.seek(offset)
            file.write(b"x" * length)
    await served.graph.add({"driver": "file", "node-name": "sparse", "filename": str(image)})
    served.add("e-sparse", "sparse")
    command = ("/usr/bin/python3", "-c", HOLES)
    ours = await served.run(lambda: execute(*command, uri(served, "sparse"), str(image)))
    options = (
        *("--blockdev", f"driver=file,node-name=sparse,filename={image}"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=e,node-name=sparse"),
    )
    daemon = await asyncio.create_subprocess_exec("qemu-storage-daemon", *options)
    try:
        async with asyncio.timeout(20):
            while not socket.exists():
                await asyncio.sleep(0.05)
        # It makes its socket before its export.
        await asyncio.sleep(0.5)
        address = f"nbd+unix:///sparse?socket={socket}"
        theirs = await served.run(lambda: execute(*command, address, str(image)))
    finally:
        daemon.terminate()
        await daemon.wait()
    assert ours == theirs
    assert ours.count("hole") == 4


@pytest.mark.peer("qemu-io", "qemu-img")
async def test_qemu_as_client_gets_extended_headers(disk: Served) -> None:
    def client() -> str:
        command = ["qemu-io", "--trace", "nbd_receive_option_reply", "-f", "raw"]
        commands = ["-c", "write -P 3 0 64k", "-c", "write -z 1M 4M", "-c", "read -P 3 0 64k"]
        done = subprocess.run([*command, *commands, uri(disk)], capture_output=True, text=True, check=True)
        return done.stderr + done.stdout

    output = await disk.run(client)
    assert "Received option reply 11 (extended headers), type 1 (ack)" in output
    assert "failed" not in output


def certificates(directory: Path) -> None:
    """An authority, and a server's certificate for localhost, as `tls-creds-x509` wants the files named."""
    directory.mkdir()
    request = ("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj")
    execute(*request, "/CN=authority", "-x509", "-keyout", "ca-key.pem", "-out", "ca-cert.pem", cwd=directory)
    execute(*request, "/CN=localhost", "-keyout", "server-key.pem", "-out", "server.csr", cwd=directory)
    (directory / "names").write_text("subjectAltName=DNS:localhost\n")
    execute(
        *("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
        *("-CAcreateserial", "-extfile", "names", "-out", "server-cert.pem"),
        cwd=directory,
    )


@pytest.mark.peer("nbdinfo", "nbdcopy", "openssl")
async def test_tls_clients_are_served_and_others_are_told_to_use_it(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    certificates(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
    served = Served(tmp_path)
    await served.start(credentials=lambda: context)
    data = os.urandom(SIZE)
    served.image.write_bytes(data)
    secured = f"nbds+unix://localhost/f?socket={served.socket}&tls-certificates={directory}"

    def client() -> None:
        copied = tmp_path / "copied"
        execute("nbdcopy", secured, str(copied))
        assert copied.read_bytes() == data
        copied.write_bytes(data[::-1])
        execute("nbdcopy", "--flush", str(copied), secured)
        assert execute("nbdinfo", "--size", uri(served, "f"), check=False) == ""

    await served.run(client)
    assert served.image.read_bytes() == data[::-1]
    await served.exports.close()
    await served.graph.close()
