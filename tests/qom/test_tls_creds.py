from __future__ import annotations

import ssl
import sys
from pathlib import Path
from typing import Any

import certificates
import pytest
from certificates import AUTHORITY, CLIENT, EMAIL, SERVER, wrong
from cryptography.hazmat.primitives.asymmetric import rsa

from qmpd.errors import Error
from qmpd.qom.tls_creds import distinguished_name, read_pre_shared_keys
from qmpd.qom.tree import ObjectTree


async def add(tree: ObjectTree, name: str, directory: Path, **options: Any) -> None:
    given = {"endpoint": "server", **{key.replace("_", "-"): value for key, value in options.items()}}
    await tree.add({"qom-type": "tls-creds-x509", "id": name, "dir": str(directory), **given})


@pytest.mark.parametrize("endpoint", ["server", "client"])
async def test_good_certificates_are_taken(tree: ObjectTree, tmp_path: Path, endpoint: str) -> None:
    await add(tree, "t", certificates.write(tmp_path), endpoint=endpoint)
    assert tree.get("t", "dir") == str(tmp_path)
    assert tree.get("t", "verify-peer") is True
    assert [each["name"] for each in tree.properties("t")] == [
        "type",
        "endpoint",
        "dir",
        "verify-peer",
        "priority",
        "sanity-check",
        "passwordid",
    ]


CA_FILE, SERVER_FILE = "{}/ca-cert.pem", "{}/server-cert.pem"


@pytest.mark.parametrize(
    ("authority", "message"),
    [
        ({"authority": False}, f"The certificate {CA_FILE} basic constraints do not show a CA"),
        ({"authority": None}, f"The certificate {CA_FILE} is missing basic constraints for a CA"),
        ({"usages": ()}, f"Certificate {CA_FILE} usage does not permit certificate signing"),
        ({"ends": -1}, f"The CA certificate {CA_FILE} has expired"),
    ],
)
async def test_a_wrong_authority_is_found_at_once(
    tree: ObjectTree, tmp_path: Path, authority: dict[str, Any], message: str
) -> None:
    certificates.write(tmp_path, authority=wrong(AUTHORITY, **authority))
    await check_refusal(tree, tmp_path, message)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            {"authority": True},
            f"The certificate {SERVER_FILE} basic constraints show a CA, but we need one for a server",
        ),
        (
            {"usages": ("key_encipherment",)},
            f"Certificate {SERVER_FILE} usage does not permit digital signature",
        ),
        (
            {"usages": ("digital_signature",)},
            f"Certificate {SERVER_FILE} usage does not permit key encipherment",
        ),
        ({"purpose": EMAIL}, f"Certificate {SERVER_FILE} purpose does not allow use with a TLS server"),
        ({"ends": -1}, f"The server certificate {SERVER_FILE} has expired"),
        ({"begins": 2}, f"The server certificate {SERVER_FILE} is not yet active"),
    ],
)
async def test_a_wrong_certificate_is_found_at_once(
    tree: ObjectTree, tmp_path: Path, server: dict[str, Any], message: str
) -> None:
    certificates.write(tmp_path, server=wrong(SERVER, **server))
    await check_refusal(tree, tmp_path, message)


async def check_refusal(tree: ObjectTree, directory: Path, message: str) -> None:
    with pytest.raises(Error) as refusal:
        await add(tree, "t", directory)
    assert refusal.value.desc == message.format(directory)
    assert "t" not in tree.objects.children


async def test_a_client_s_certificate_is_looked_at_where_it_is_used(tree: ObjectTree, tmp_path: Path) -> None:
    certificates.write(tmp_path, client=wrong(CLIENT, purpose=EMAIL))
    await add(tree, "server", tmp_path)
    with pytest.raises(Error, match="client-cert.pem purpose does not allow use with a TLS client$"):
        await add(tree, "client", tmp_path, endpoint="client")
    (tmp_path / "client-cert.pem").unlink()
    await add(tree, "nameless", tmp_path, endpoint="client")


async def test_the_checks_can_be_left_out(tree: ObjectTree, tmp_path: Path) -> None:
    certificates.write(tmp_path, server=wrong(SERVER, ends=-1))
    await add(tree, "t", tmp_path, sanity_check=False)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
async def test_a_missing_file_is_named(tree: ObjectTree, tmp_path: Path, name: str) -> None:
    (certificates.write(tmp_path) / name).unlink()
    with pytest.raises(Error) as refusal:
        await add(tree, "t", tmp_path)
    assert refusal.value.desc == f"Unable to access credentials {tmp_path}/{name}: No such file or directory"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ca-cert.pem", "Unable to import CA certificate list {0}/ca-cert.pem"),
        (
            "server-cert.pem",
            "Unable to import server certificate {0}/server-cert.pem: Base64 unexpected header error.",
        ),
        (
            "server-key.pem",
            "Cannot load certificate '{0}/server-cert.pem' & key '{0}/server-key.pem': "
            "The requested data were not available.",
        ),
        ("ca-crl.pem", "Cannot load CRL '{0}/ca-crl.pem': Base64 decoding error."),
    ],
)
async def test_a_file_of_something_else_is_named(
    tree: ObjectTree, tmp_path: Path, name: str, message: str
) -> None:
    (certificates.write(tmp_path) / name).write_text("something else\n")
    with pytest.raises(Error) as refusal:
        await add(tree, "t", tmp_path)
    assert refusal.value.desc == message.format(tmp_path)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (
            "server-key.pem",
            "Cannot load certificate '{0}/server-cert.pem' & key '{0}/server-key.pem': "
            "The certificate and the given key do not match.",
        ),
        (
            "ca-cert.pem",
            "Our own certificate {0}/server-cert.pem failed validation against {0}/ca-cert.pem: "
            "The certificate hasn't got a known issuer",
        ),
    ],
)
async def test_files_have_to_belong_together(
    tree: ObjectTree, tmp_path: Path, foreign: str, message: str
) -> None:
    mine, others = certificates.write(tmp_path / "mine"), certificates.write(tmp_path / "others")
    (mine / foreign).write_bytes((others / foreign).read_bytes())
    with pytest.raises(Error) as refusal:
        await add(tree, "t", mine)
    assert refusal.value.desc == message.format(mine)


async def test_a_key_is_decrypted_with_a_secret(tree: ObjectTree, tmp_path: Path) -> None:
    certificates.write(tmp_path, password=b"abc")
    for name, data in (("right", "abc"), ("wrong", "abd")):
        await tree.add({"qom-type": "secret", "id": name, "data": data})
    for options in ({}, {"passwordid": "wrong"}):
        with pytest.raises(Error, match=r"server-key\.pem': Decryption has failed\.$"):
            await add(tree, "t", tmp_path, **options)
    with pytest.raises(Error, match="^No secret with id 'none'$"):
        await add(tree, "t", tmp_path, passwordid="none")
    await add(tree, "t", tmp_path, passwordid="right")


async def test_a_server_needs_a_server_s_credentials(tree: ObjectTree, tmp_path: Path) -> None:
    certificates.write(tmp_path)
    await add(tree, "server", tmp_path)
    await add(tree, "client", tmp_path, endpoint="client")
    await tree.add({"qom-type": "secret", "id": "s", "data": "x"})
    for name, message in (
        ("client", "Expected TLS credentials for a server endpoint"),
        ("s", "Object with id 's' is not TLS credentials"),
        ("none", "No TLS credentials with id 'none'"),
    ):
        with pytest.raises(Error, match=f"^{message}$"):
            tree.tls_server_context(name)
    assert tree.tls_server_context("server").verify_mode is ssl.CERT_REQUIRED
    tree.set("server", "verify-peer", False)
    assert tree.tls_server_context("server").verify_mode is ssl.CERT_NONE


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Let two sides talk in memory until both are done."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
    ]
    for _ in range(10):
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
        if not sides:
            return
    raise AssertionError("the sides do not get on")


async def test_who_comes_in_is_decided_when_they_come(tree: ObjectTree, tmp_path: Path) -> None:
    await add(tree, "t", certificates.write(tmp_path))
    client = ssl.create_default_context(cafile=tmp_path / "ca-cert.pem")
    client.load_cert_chain(tmp_path / "client-cert.pem", tmp_path / "client-key.pem")
    handshake(tree.tls_server_context("t"), client)
    server = tree.tls_server_context("t", "a")
    with pytest.raises(ssl.SSLError, match="TLS x509 authz check for O=qmpd,CN=client is denied"):
        handshake(server, client)
    await tree.add({"qom-type": "authz-simple", "id": "a", "identity": "O=qmpd,CN=client"})
    handshake(server, client)
    tree.set("a", "identity", "CN=client,O=qmpd")
    with pytest.raises(ssl.SSLError, match="is denied"):
        handshake(server, client)


async def test_a_client_without_a_certificate_does_not_come_in(tree: ObjectTree, tmp_path: Path) -> None:
    await add(tree, "t", certificates.write(tmp_path))
    client = ssl.create_default_context(cafile=tmp_path / "ca-cert.pem")
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(tree.tls_server_context("t"), client)


def test_a_name_is_written_as_gnutls_does(tmp_path: Path) -> None:
    pem = (certificates.write(tmp_path) / "client-cert.pem").read_text()
    assert distinguished_name(ssl.PEM_cert_to_DER_cert(pem)) == "O=qmpd,CN=client"


@pytest.mark.parametrize(
    ("priority", "oldest", "newest"),
    [
        ("", "TLSv1_2", "TLSv1_3"),
        ("SECURE256:%SERVER_PRECEDENCE:-VERS-TLS1.0", "TLSv1_2", "TLSv1_3"),
        ("NORMAL:-VERS-TLS1.3", "TLSv1_2", "TLSv1_2"),
        ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.3:+CIPHER-ALL", "TLSv1_3", "TLSv1_3"),
        ("NONE:+VERS-ALL", "TLSv1_2", "TLSv1_3"),
    ],
)
async def test_versions_are_those_that_the_priority_leaves(
    tree: ObjectTree, tmp_path: Path, priority: str, oldest: str, newest: str
) -> None:
    await add(tree, "t", certificates.write(tmp_path), priority=priority)
    context = tree.tls_server_context("t")
    assert (context.minimum_version.name, context.maximum_version.name) == (oldest, newest)


async def test_a_priority_without_any_version_is_refused(tree: ObjectTree, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"^Priority 'NORMAL:-VERS-ALL' leaves no version of TLS"):
        await add(tree, "t", certificates.write(tmp_path), priority="NORMAL:-VERS-ALL")


async def test_a_weak_key_is_not_said_to_be_a_wrong_one(tree: ObjectTree, tmp_path: Path) -> None:
    certificates.write(tmp_path, server_key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(Error, match="OpenSSL does not take it: EE_KEY_TOO_SMALL"):
        await add(tree, "t", tmp_path)


# -- pre-shared keys


async def add_keys(tree: ObjectTree, directory: Path) -> None:
    options = {"dir": str(directory), "endpoint": "server"} if directory.name else {}
    await tree.add({"qom-type": "tls-creds-psk", "id": "p", **options})


async def test_pre_shared_keys_are_refused_clearly_where_python_has_none(
    tree: ObjectTree, tmp_path: Path
) -> None:
    with pytest.raises(Error, match="^Missing 'dir' property value$"):
        await add_keys(tree, Path())
    with pytest.raises(
        Error, match=r"^Unable to access credentials .*/keys\.psk: No such file or directory$"
    ):
        await add_keys(tree, tmp_path)
    (tmp_path / "keys.psk").write_text("qemu:0a0b\n")
    if sys.version_info < (3, 13):
        with pytest.raises(Error, match=r"^TLS with pre-shared keys needs Python 3\.13 or later"):
            await add_keys(tree, tmp_path)
    else:
        await add_keys(tree, tmp_path)


def test_the_keys_are_read_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("# comment\n\nqemu:0a0B\nother:ff\n")
    assert read_pre_shared_keys(str(path)) == {"qemu": b"\x0a\x0b", "other": b"\xff"}
    path.write_text("qemu:0a0b\nother:f00baz\n")
    with pytest.raises(Error) as refusal:
        read_pre_shared_keys(str(path))
    assert refusal.value.desc.startswith(f"Line 2 of {path} is not NAME:KEY")
    assert "f00" not in refusal.value.desc
