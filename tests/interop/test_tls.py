"""Who gets in with which TLS credentials, as other people's clients find it.

The same is asked of qemu-storage-daemon, so that what is expected here is what QEMU does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import certificates
import pytest
from certificates import CLIENT, wrong
from cryptography.hazmat.primitives.asymmetric import ec
from daemons import PATIENCE, QMPD, STORAGE_DAEMON, RunningDaemon

SIZE = 64 << 10
NAME = "O=qmpd,,CN=client"

PROGRAMS = [
    pytest.param(QMPD, id="qmpd"),
    pytest.param(STORAGE_DAEMON, id="qsd", marks=pytest.mark.peer("qemu-storage-daemon")),
]

Serve = Callable[..., RunningDaemon]


@pytest.fixture(params=PROGRAMS)
def serve(request: pytest.FixtureRequest, start_daemon: Callable[..., RunningDaemon]) -> Serve:
    """Start an NBD server with the export "n": ``serve(credentials, *options, authorization=None)``."""

    def start(credentials: str, *options: str, authorization: str | None = None) -> RunningDaemon:
        server = "addr.type=unix,addr.path=nbd.sock,tls-creds=t"
        if authorization is not None:
            options = ("--object", f"{authorization},id=a", *options)
            server += ",tls-authz=a"
        return start_daemon(
            *("--object", f"{credentials},id=t,endpoint=server", *options, "--nbd-server", server),
            *(
                "--blockdev",
                "file,filename=disk.img,node-name=n",
                "--export",
                "nbd,id=n,node-name=n,writable=on",
            ),
            program=request.param,
        )

    return start


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """Directories with a client's certificate, good or wrong, and the server's in "good"; and a disk."""
    authority = ec.generate_private_key(ec.SECP256R1())
    certificates.write(tmp_path / "good", signer=authority)
    certificates.write(tmp_path / "expired", signer=authority, client=wrong(CLIENT, ends=-1))
    certificates.write(tmp_path / "early", signer=authority, client=wrong(CLIENT, begins=3))
    certificates.write(tmp_path / "foreign")
    (tmp_path / "none").mkdir()
    for name in ("foreign", "none"):
        (tmp_path / name / "ca-cert.pem").write_bytes((tmp_path / "good/ca-cert.pem").read_bytes())
    # Without it QEMU looks for large primes each time.
    group = ("-algorithm", "DH", "-pkeyopt", "group:ffdhe2048", "-out", str(tmp_path / "good/dh-params.pem"))
    subprocess.run(("openssl", "genpkey", "-genparam", *group), check=True, capture_output=True)
    (tmp_path / "disk.img").write_bytes(bytes(range(256)) * (SIZE >> 8))
    return tmp_path


def client(daemon: RunningDaemon, *command: str) -> bool:
    """Whether a client's command goes well."""
    done = subprocess.run(command, cwd=daemon.directory, capture_output=True, timeout=PATIENCE, check=False)
    return done.returncode == 0


def nbdinfo(daemon: RunningDaemon, query: str, user: str = "") -> bool:
    return client(daemon, "nbdinfo", "--size", f"nbds+unix://{user}localhost/n?socket=nbd.sock&{query}")


def qemu_img(daemon: RunningDaemon, credentials: str, host: str = "localhost") -> bool:
    name = f",tls-hostname={host}" if host else ""
    options = f"driver=nbd,server.type=unix,server.path=nbd.sock,export=n,tls-creds=t{name}"
    secured = f"{credentials},id=t,endpoint=client"
    return client(daemon, "qemu-img", "info", "--object", secured, "--image-opts", options)


CLIENTS = ("good", "none", "foreign", "expired", "early")


@pytest.mark.peer("openssl", "nbdinfo", "qemu-img")
@pytest.mark.parametrize(("verify", "let_in"), [("off", set(CLIENTS)), ("on", {"good"})])
def test_certificates_are_looked_at_where_peers_are_verified(
    serve: Serve, pki: Path, verify: str, let_in: set[str]
) -> None:
    daemon = serve(f"tls-creds-x509,dir=good,verify-peer={verify}")
    assert {name for name in CLIENTS if nbdinfo(daemon, f"tls-certificates={name}")} == let_in
    # QEMU's client does not even try with a certificate that is wrong.
    for name in ("good", "none"):
        assert qemu_img(daemon, f"tls-creds-x509,dir={name}") is (name in let_in)
    assert not qemu_img(daemon, "tls-creds-x509,dir=good", host="elsewhere")
    assert not client(daemon, "nbdinfo", "--size", "nbd+unix:///n?socket=nbd.sock")
    daemon.execute("query-block-exports")


@pytest.mark.peer("openssl", "nbdcopy", "qemu-img")
def test_data_goes_both_ways_through_tls(serve: Serve, pki: Path) -> None:
    daemon = serve("tls-creds-x509,dir=good")
    uri = "nbds+unix://localhost/n?socket=nbd.sock&tls-certificates=good"
    before = (pki / "disk.img").read_bytes()
    assert client(daemon, "nbdcopy", uri, "copied")
    assert (pki / "copied").read_bytes() == before
    (pki / "copied").write_bytes(before[::-1])
    assert client(daemon, "nbdcopy", "--flush", "copied", uri)
    assert (pki / "disk.img").read_bytes() == before[::-1]
    target = "driver=nbd,server.type=unix,server.path=nbd.sock,export=n,tls-creds=t,tls-hostname=localhost"
    secured = ("--object", "tls-creds-x509,id=t,dir=good,endpoint=client")
    source = "driver=raw,file.filename=disk.img"
    assert client(daemon, "qemu-img", "compare", *secured, "--image-opts", source, target)


@pytest.mark.peer("openssl", "nbdinfo")
@pytest.mark.parametrize(
    ("authorization", "let_in"),
    [
        (f"authz-simple,identity={NAME}", True),
        ("authz-simple,identity=CN=client", False),
        (f"authz-list,policy=deny,rules.0.match={NAME},rules.0.policy=allow", True),
        ("authz-list,policy=deny,rules.0.match=*CN=cl*,rules.0.policy=allow,rules.0.format=glob", True),
        ("authz-list,policy=deny,rules.0.match=*CN=cl*,rules.0.policy=allow,rules.0.format=exact", False),
        ("authz-list,policy=allow,rules.0.match=*CN=cl*,rules.0.policy=deny,rules.0.format=glob", False),
        ("authz-list,policy=allow", True),
        ("authz-list", False),
    ],
)
def test_names_decide_who_gets_in(serve: Serve, pki: Path, authorization: str, let_in: bool) -> None:
    daemon = serve("tls-creds-x509,dir=good", authorization=authorization)
    assert nbdinfo(daemon, "tls-certificates=good") is let_in
    assert not nbdinfo(daemon, "tls-certificates=none")
    daemon.execute("object-del", {"id": "a"})
    assert not nbdinfo(daemon, "tls-certificates=good")


@pytest.mark.peer("openssl", "nbdinfo")
def test_revoked_certificates_do_not_get_in(serve: Serve, pki: Path) -> None:
    authority = ec.generate_private_key(ec.SECP256R1())
    certificates.write(pki / "good", signer=authority)
    certificates.revoke(pki / "good", authority)
    daemon = serve("tls-creds-x509,dir=good")
    assert not nbdinfo(daemon, "tls-certificates=good")


@pytest.mark.peer("openssl", "qemu-img")
@pytest.mark.parametrize(
    ("priority", "spoken"),
    [
        ("NORMAL", {"1.2", "1.3"}),
        ("NORMAL:-VERS-TLS1.3", {"1.2"}),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", {"1.3"}),
    ],
)
def test_priority_says_which_versions_are_spoken(
    serve: Serve, pki: Path, priority: str, spoken: set[str]
) -> None:
    daemon = serve(f"tls-creds-x509,dir=good,priority={priority}")
    only = "tls-creds-x509,dir=good,priority=NORMAL:-VERS-ALL:+VERS-TLS"
    assert {version for version in ("1.2", "1.3") if qemu_img(daemon, only + version)} == spoken


@pytest.mark.peer("openssl", "qemu-img")
def test_nobody_needs_a_certificate_for_anonymous_tls(serve: Serve, pki: Path) -> None:
    (pki / "psk").mkdir()
    (pki / "psk/keys.psk").write_text("qemu:00112233445566778899aabbccddeeff\n")
    daemon = serve("tls-creds-anon,dir=good")
    assert qemu_img(daemon, "tls-creds-anon", host="")
    assert not qemu_img(daemon, "tls-creds-x509,dir=good")
    assert not qemu_img(daemon, "tls-creds-psk,dir=psk", host="")


@pytest.mark.peer("openssl", "qemu-img", "nbdinfo")
def test_keys_that_both_sides_know_let_in(serve: Serve, pki: Path, request: pytest.FixtureRequest) -> None:
    for name, keys in (
        ("psk", "qemu:00112233445566778899aabbccddeeff\nother:ffeeddccbbaa99887766554433221100\n"),
        ("wrong", "qemu:ffeeddccbbaa99887766554433221100\nstranger:00112233445566778899aabbccddeeff\n"),
    ):
        (pki / name).mkdir()
        (pki / name / "keys.psk").write_text(keys)
    if "qmpd" in request.node.callspec.id and sys.version_info < (3, 13):
        with pytest.raises(AssertionError, match=r"TLS with pre-shared keys needs Python 3\.13 or later"):
            serve("tls-creds-psk,dir=psk")
        return
    (pki / "psk/dh-params.pem").write_bytes((pki / "good/dh-params.pem").read_bytes())
    daemon = serve("tls-creds-psk,dir=psk")
    for user in ("qemu", "other"):
        assert qemu_img(daemon, f"tls-creds-psk,dir=psk,username={user}", host="")
        assert nbdinfo(daemon, "tls-psk-file=psk/keys.psk", f"{user}@")
    for user in ("qemu", "stranger"):
        assert not qemu_img(daemon, f"tls-creds-psk,dir=wrong,username={user}", host="")
    assert not qemu_img(daemon, "tls-creds-anon", host="")
