"""Certificates for tests: an authority, a server and a client, right or wrong in one respect."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Kind:
    """What a certificate says of itself; the extensions are critical."""

    name: str
    authority: bool | None = False
    usages: tuple[str, ...] | None = ("digital_signature", "key_encipherment")
    purpose: x509.ObjectIdentifier | None = None
    #: Days from now.
    begins: int = -1
    ends: int = 10


AUTHORITY = Kind("authority", authority=True, usages=("key_cert_sign", "crl_sign"))
SERVER = Kind("localhost", purpose=ExtendedKeyUsageOID.SERVER_AUTH)
CLIENT = Kind("client", purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
EMAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION

_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def write(
    directory: Path,
    *,
    authority: Kind = AUTHORITY,
    server: Kind = SERVER,
    client: Kind = CLIENT,
    password: bytes | None = None,
    signer: ec.EllipticCurvePrivateKey | None = None,
    server_key: rsa.RSAPrivateKey | None = None,
) -> Path:
    """Write all files of the credentials "tls-creds-x509" into `directory`.

    :param signer: the authority's key; a new one if it is not given.
    :param server_key: an elliptic one if it is not given.
    """
    directory.mkdir(exist_ok=True)
    signer = signer or ec.generate_private_key(ec.SECP256R1())
    (directory / "ca-cert.pem").write_bytes(_certificate(authority, signer, authority, signer))
    for role, kind in (("server", server), ("client", client)):
        own = server_key if role == "server" else None
        key = own or ec.generate_private_key(ec.SECP256R1())
        (directory / f"{role}-cert.pem").write_bytes(_certificate(kind, key, authority, signer))
        (directory / f"{role}-key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
            )
        )
    return directory


def revoke(directory: Path, signer: ec.EllipticCurvePrivateKey) -> None:
    """Let the authority take back the client's certificate in a directory that `write` made."""
    now = datetime.datetime.now(datetime.UTC)
    client = x509.load_pem_x509_certificate((directory / "client-cert.pem").read_bytes())
    revoked = (
        x509.RevokedCertificateBuilder().serial_number(client.serial_number).revocation_date(now).build()
    )
    revocations = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(AUTHORITY))
        .last_update(now - datetime.timedelta(days=1))
        .next_update(now + datetime.timedelta(days=1))
        .add_revoked_certificate(revoked)
        .sign(signer, hashes.SHA256())
    )
    (directory / "ca-crl.pem").write_bytes(revocations.public_bytes(serialization.Encoding.PEM))


def wrong(kind: Kind, **changes: object) -> Kind:
    """A kind that differs in one respect."""
    return replace(kind, **changes)  # type: ignore[arg-type]


def _certificate(
    kind: Kind,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    issuer: Kind,
    signer: ec.EllipticCurvePrivateKey,
) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(kind))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=min(kind.begins, kind.ends - 1)))
        .not_valid_after(now + datetime.timedelta(days=kind.ends))
    )
    if kind.authority is not None:
        builder = builder.add_extension(x509.BasicConstraints(kind.authority, None), critical=True)
    if kind.usages is not None:
        usage = x509.KeyUsage(**{name: name in kind.usages for name in _USAGES})
        builder = builder.add_extension(usage, critical=True)
    if kind.purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([kind.purpose]), critical=True)
    if kind is not AUTHORITY:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(kind: Kind) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "qmpd"),
            x509.NameAttribute(NameOID.COMMON_NAME, kind.name),
        ]
    )
