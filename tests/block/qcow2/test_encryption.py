"""Images whose data is encrypted inside: QEMU's and qmpd's programs read and write each other's."""

from __future__ import annotations

import errno
import random
import tracemalloc
from pathlib import Path
from typing import Any, Final

import pytest
from qcow2_images import attach, detach, run

from qmpd.block.drivers.qcow2 import creation
from qmpd.block.drivers.qcow2.metadata import Metadata
from qmpd.block.graph import Graph
from qmpd.block.node import errno_error
from qmpd.crypto import sectors
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KILOBYTE: Final = 1 << 10
SIZE: Final = 3 << 20
SECRET: Final = ("--object", "secret,id=pw,data=pw")

LUKS: Final = "encrypt.format=luks,encrypt.key-secret=pw,encrypt.iter-time=1"
AES: Final = "encrypt.format=aes,encrypt.key-secret=pw"
ESSIV: Final = "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"

#: QEMU measures its key derivation for two seconds whenever it makes a LUKS header: a few of these.
OPTIONS: Final = (
    f"{LUKS}",
    f"{LUKS},{ESSIV},compat=0.10,cluster_size=512",
    f"{LUKS},encrypt.ivgen-alg=plain,extended_l2=on,cluster_size=32k",
    f"{LUKS},data_file=data.raw,cluster_size=4k",
    f"{AES}",
    f"{AES},compat=0.10,cluster_size=1k",
    f"{AES},extended_l2=on,cluster_size=32k",
    f"{AES},data_file=data.raw",
    f"{AES},cluster_size=2M,lazy_refcounts=on",
)


def encryption(options: str) -> dict[str, Any]:
    """BlockdevQcow2Encryption for an image with these options."""
    return {"format": "luks" if "=luks" in options else "aes", "key-secret": "pw"}


def spelled(path: Path, options: str) -> str:
    """How QEMU's programs are told of an image."""
    kind = encryption(options)["format"]
    return f"driver=qcow2,file.filename={path},encrypt.format={kind},encrypt.key-secret=pw"


def create(directory: Path, options: str, *, backing: bool = False, size: int = SIZE) -> Path:
    chosen = options.replace("data.raw", str(directory / "data.raw"))
    more = ["-b", "base.raw", "-F", "raw"] if backing else []
    run(
        directory,
        "qemu-img",
        "create",
        "-q",
        *SECRET,
        "-f",
        "qcow2",
        "-o",
        chosen,
        *more,
        "d.qcow2",
        str(size),
    )
    return directory / "d.qcow2"


def judge(path: Path, options: str, model: bytes | bytearray) -> None:
    """qemu-img finds neither error nor leak, and what `model` holds."""
    image = spelled(path, options)
    run(path.parent, "qemu-img", "check", "-q", *SECRET, "--image-opts", image)
    path.with_name("model.raw").write_bytes(model)
    run(path.parent, "qemu-img", "compare", *SECRET, "--image-opts",
        "driver=raw,file.filename=model.raw", image)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
async def test_what_one_writes_the_other_reads(graph: Graph, tmp_path: Path, options: str) -> None:
    """Over a backing image that is not encrypted; each changes what the other wrote."""
    chance = random.Random(options)
    base = chance.randbytes(2 << 20)
    (tmp_path / "base.raw").write_bytes(base)
    backed = "data_file" not in options
    path = create(tmp_path, options, backing=backed)
    model = bytearray(base.ljust(SIZE, b"\0") if backed else bytes(SIZE))
    commands: list[str] = []
    for pattern in range(1, 11):
        start, length = chance.randrange(0, 2800) * KILOBYTE, chance.choice((1, 4, 70, 200)) * KILOBYTE
        kind = chance.choice((f"write -P {pattern}", f"write -P {pattern}", "write -z"))
        model[start : start + length] = bytes([pattern if "-P" in kind else 0]) * length
        commands += ["-c", f"{kind} {start} {length}"]
    run(tmp_path, "qemu-io", *SECRET, *commands, "--image-opts", spelled(path, options))

    backend = await attach(graph, path, encrypt=encryption(options))
    assert bytes(await backend.pread(0, SIZE)) == model
    for _ in range(60):
        length = chance.choice((1, 512, 3000, 65536, 300 << 10))
        start = chance.randrange(0, SIZE - length)
        match chance.randrange(5):
            case 0:
                await backend.write_zeroes(start, length, unmap=chance.random() < 0.5)
                model[start : start + length] = bytes(length)
            case 1:
                assert bytes(await backend.pread(start, length)) == model[start : start + length]
            case _:
                data = chance.randbytes(length)
                await backend.pwrite(start, data)
                model[start : start + length] = data
    assert bytes(await backend.pread(0, SIZE)) == model
    await detach(graph, backend)
    judge(path, options, model)


async def test_plaintext_does_not_reach_the_storage(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path, AES)
    backend = await attach(graph, path, encrypt=encryption(AES))
    await backend.pwrite(0, b"in the clear " * 5000)
    await backend.pwrite(1 << 20, b"in the clear")
    await detach(graph, backend)
    assert b"in the clear" not in path.read_bytes()


async def test_a_new_cluster_around_little_data_reads_as_zeroes(graph: Graph, tmp_path: Path) -> None:
    """Zeroes in the file would be noise."""
    options = f"{AES},cluster_size=2M"
    path = create(tmp_path, options)
    backend = await attach(graph, path, encrypt=encryption(options))
    await backend.pwrite(1 << 20, b"x" * 512)
    await detach(graph, backend)
    judge(path, options, bytes(1 << 20) + b"x" * 512 + bytes(SIZE - (1 << 20) - 512))


async def test_compressed_clusters_in_an_encrypted_image_are_read_as_they_are(
    graph: Graph, tmp_path: Path
) -> None:
    """Nothing encrypts them.  QEMU makes no such image, but reads one."""
    (tmp_path / "s.raw").write_bytes(b"words " * 43690 + bytes(4))
    run(tmp_path, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "s.raw", "d.qcow2")
    path = tmp_path / "d.qcow2"
    with path.open("r+b") as image:
        image.seek(32)
        image.write((1).to_bytes(4, "big"))
    backend = await attach(graph, path, encrypt=encryption(AES))
    model = bytearray((tmp_path / "s.raw").read_bytes())
    assert bytes(await backend.pread(0, len(model))) == model
    await backend.pwrite(70_000, b"y" * 512)
    model[70_000:70_512] = b"y" * 512
    await detach(graph, backend)
    judge(path, AES, model)


async def test_a_sector_of_the_old_method_beyond_two_tebibytes_has_the_iv_that_qemu_gives_it(
    graph: Graph, tmp_path: Path
) -> None:
    options = f"{AES},cluster_size=2M"
    path = create(tmp_path, options, size=3 << 40)
    run(tmp_path, "qemu-io", *SECRET, "-c", "write -P 65 2T 512", "--image-opts", spelled(path, options))
    backend = await attach(graph, path, encrypt=encryption(options))
    assert bytes(await backend.pread(2 << 40, 512)) == b"A" * 512
    await detach(graph, backend)


async def test_a_compressed_or_plain_image_takes_no_encryption(graph: Graph, tmp_path: Path) -> None:
    run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "d.qcow2", "1M")
    with pytest.raises(Error, match="^No encryption in image header, but options specified format 'luks'$"):
        await attach(graph, tmp_path / "d.qcow2", encrypt=encryption(LUKS))
    assert not graph._nodes


async def test_the_key_is_wiped_when_the_node_goes_and_when_it_fails_to_open(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ciphers: list[sectors.SectorCipher] = []
    passwords: list[KeyBuffer] = []
    made = sectors.SectorCipher.__init__

    def remember(cipher: sectors.SectorCipher, *arguments: Any, **more: Any) -> None:
        made(cipher, *arguments, **more)
        ciphers.append(cipher)

    def secret(secret_id: str) -> KeyBuffer:
        passwords.append(KeyMemory().copy_of(b"pw"))
        return passwords[-1]

    async def fail(meta: Metadata) -> None:
        raise errno_error(errno.EIO)

    monkeypatch.setattr(sectors.SectorCipher, "__init__", remember)
    monkeypatch.setattr(graph, "secrets", secret)
    for options in (LUKS, AES):
        path = create(tmp_path, options)
        backend = await attach(graph, path, encrypt=encryption(options))
        assert any(any(cipher._key.data) for cipher in ciphers)
        await detach(graph, backend)
        assert not any(any(cipher._key.data) for cipher in ciphers)
        with monkeypatch.context() as patch:
            patch.setattr(Metadata, "load", fail)
            with pytest.raises(Error, match="^Could not read qcow2 image: Input/output error$"):
                await attach(graph, path, encrypt=encryption(options))
    assert len(ciphers) == 6, "two volume keys and two keyslots' of LUKS, two of AES"
    assert len(passwords) == 4
    assert not any(any(cipher._key.data) for cipher in ciphers)
    assert not any(any(password.data) for password in passwords)


async def make(graph: Graph, path: Path, **more: Any) -> None:
    """An image with LUKS inside, made by qmpd."""
    path.touch()
    options = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(path)},
        "size": 1 << 20,
        "encrypt": {"format": "luks", "key-secret": "pw", "iter-time": 1},
        **more,
    }
    await creation.create(graph, options)


def crypto_extent(path: Path) -> tuple[int, int]:
    """Where the header extension is in a new image, and where the LUKS header is; in bytes."""
    data = path.read_bytes()[:4096]
    position = data.index(bytes.fromhex("0537be77"))
    return position, int.from_bytes(data[position + 8 : position + 16], "big")


async def test_a_cluster_of_the_disk_on_the_luks_header_is_not_written(graph: Graph, tmp_path: Path) -> None:
    """The entry says that the first key's material is the guest's."""
    path = tmp_path / "d.qcow2"
    await make(graph, path)
    backend = await attach(graph, path, encrypt=encryption(LUKS))
    await backend.pwrite(0, b"x" * 65536)
    await detach(graph, backend)
    _, header = crypto_extent(path)
    with path.open("r+b") as image:
        image.seek(40)
        image.seek(int.from_bytes(image.read(8), "big"))
        l2 = int.from_bytes(image.read(8), "big") & 0x00FFFFFFFFFFFE00
        image.seek(l2)
        image.write((1 << 63 | header + 65536).to_bytes(8, "big"))
    before = path.read_bytes()[header : header + (300 << 10)]
    backend = await attach(graph, path, encrypt=encryption(LUKS))
    with pytest.raises(OSError, match="Input/output error"):
        await backend.pwrite(0, b"y" * 512)
    await detach(graph, backend)
    assert path.read_bytes()[header : header + (300 << 10)] == before


async def test_the_luks_headers_clusters_are_not_given_to_the_guest(graph: Graph, tmp_path: Path) -> None:
    """Their counts say that nobody uses them."""
    path = tmp_path / "d.qcow2"
    await make(graph, path)
    _, header = crypto_extent(path)
    with path.open("r+b") as image:
        image.seek(2 * 65536 + header // 65536 * 2)
        image.write(bytes(2 * 2))
    before = path.read_bytes()[header : header + (300 << 10)]
    backend = await attach(graph, path, encrypt=encryption(LUKS))
    with pytest.raises(OSError, match="Input/output error"):
        await backend.pwrite(0, b"y" * 65536)
    await detach(graph, backend)
    assert path.read_bytes()[header : header + (300 << 10)] == before


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1])
async def test_an_absurd_length_of_the_luks_header_costs_nothing(
    graph: Graph, tmp_path: Path, length: int
) -> None:
    """QEMU takes it as well; counting anew (the image is dirty) goes as far as the file does."""
    path = tmp_path / "d.qcow2"
    await make(graph, path, **{"lazy-refcounts": True, "cluster-size": 512})
    with path.open("r+b") as image:
        image.seek(crypto_extent(path)[0] + 16)
        image.write(length.to_bytes(8, "big"))
        image.seek(72)
        image.write((1).to_bytes(8, "big"))
    tracemalloc.start()
    try:
        backend = await attach(graph, path, encrypt=encryption(LUKS))
        await backend.pwrite(0, b"z" * 4096)
        assert bytes(await backend.pread(0, 4096)) == b"z" * 4096
        await detach(graph, backend)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


async def test_what_a_failed_creation_leaves_is_what_was_there(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    path.write_bytes(b"precious")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "luks"}, "Parameter 'encrypt.key-secret' is required for cipher"),
        ({"format": "qcow"}, "Parameter 'encrypt.key-secret' is required for cipher"),
        ({"format": "luks", "key-secret": "no"}, "No secret with id 'no'"),
        ({"format": "luks", "key-secret": "pw", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"},
         "No AES cipher with key size 20 available"),
    )  # fmt: skip
    for options, text in wrong:
        with pytest.raises(Error) as caught:
            await make(graph, path, encrypt=options)
        assert caught.value.desc == text
        assert path.read_bytes() == b"precious"
