"""TLS credentials: certificates, keys that both sides know, or nothing at all.

The files are read once, when the object is made, into an `ssl.SSLContext`,
which later connections share.  Before that certificates are looked at, because
a mistake in them is otherwise only found out when somebody can't connect; the
checks and their wording are QEMU's, see `_check`.

QEMU does TLS with GnuTLS, and ``priority`` is a text in GnuTLS's language.  What
it says about versions is followed, see `_versions`; the algorithms are OpenSSL's
choice.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import ssl
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qmpd.crypto.memory import KeyBuffer
from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable

if TYPE_CHECKING:
    from cryptography import x509

    from qmpd.qom.tree import ObjectTree

_CA_CERTIFICATE: Final = "ca-cert.pem"
_CA_REVOCATIONS: Final = "ca-crl.pem"
_PRE_SHARED_KEYS: Final = "keys.psk"
_DH_PARAMETERS: Final = "dh-params.pem"
#: RFC 7919, appendix A.1: the group ffdhe2048.
_FFDHE2048: Final = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
_KEY_LINE: Final = re.compile(r"([^:]+):((?:[0-9A-Fa-f]{2})+)")

#: The name of a client that does not say which one is its own.
_PSK_USER: Final = "qemu"


class TLSCredentials(UserCreatable):
    """What all kinds of credentials have in common."""

    #: The values of the properties that only this kind has.
    _defaults: Mapping[str, Any] = {}
    #: Whether there is nothing without files.
    _needs_directory = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        #: What was said at all: an empty string is something else than none.
        self._given = frozenset(options)
        self._values: dict[str, Any] = {
            "endpoint": "client",
            "dir": "",
            "verify-peer": True,
            "priority": "",
            **self._defaults,
            **{name: value for name, value in options.items() if name not in ("qom-type", "id")},
        }
        self._context: ssl.SSLContext | None = None
        self._loaded_for: str | None = None

    def server_context(self, authorized: Callable[[str], bool] | None = None) -> ssl.SSLContext:
        """What a server needs for its side of a connection.

        There is one for these credentials, and whoever asked last decides who is authorized.

        :param authorized: whether a client with this name may come in; None to let everybody in.
        :raise Error: if these are a client's credentials.
        """
        if self._values["endpoint"] != "server" or self._loaded_for != "server" or self._context is None:
            raise Error("Expected TLS credentials for a server endpoint")
        self._context.sslobject_class = ssl.SSLObject if authorized is None else _authorizing(authorized)
        return self._context

    async def complete(self, options: Mapping[str, Any], tree: ObjectTree) -> None:
        """Read the files.

        :raise Error: if one is missing or wrong.
        """
        if self._needs_directory and "dir" not in self._given:
            raise Error("Missing 'dir' property value")
        endpoint = self._values["endpoint"]
        # The files may be on slow storage, and checking signatures takes its time.
        self._context = await asyncio.to_thread(self._load, tree.secret_bytes)
        self._loaded_for = endpoint
        self._set_verification()

    @abstractmethod
    def _load(self, secrets: Callable[[str], KeyBuffer]) -> ssl.SSLContext:
        """The context; runs in a thread.

        :raise Error: if something is missing or wrong.
        """

    def _new_context(self) -> ssl.SSLContext:
        server = self._values["endpoint"] == "server"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version, context.maximum_version = _versions(self._values["priority"])
        return context

    def _set_verification(self) -> None:
        """Ask the other side for a certificate, or not, from the next connection on."""

    def _path(self, name: str) -> str:
        # No pathlib: messages name the file as the client would put it together.
        return f"{self._values['dir']}/{name}"

    def _required(self, name: str) -> str:
        """The path of a file that has to be there.

        :raise Error: if it can't be reached.
        """
        path = self._path(name)
        try:
            os.stat(path)
        except (OSError, ValueError) as error:
            raise _inaccessible(path, error) from None
        return path

    def _optional(self, name: str) -> str | None:
        """The path of a file, or None if there is none.

        :raise Error: if that can't be found out.
        """
        path = self._path(name)
        try:
            os.stat(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _inaccessible(path, error) from None
        return path

    def _load_dh_parameters(self, context: ssl.SSLContext) -> None:
        """Use the Diffie-Hellman group that a server's file names, if there is one.

        :raise Error: if that is no group.
        """
        path = self._optional(_DH_PARAMETERS)
        if path is None:
            return
        data = _read(path, "")
        try:
            context.load_dh_params(path)
        except (ssl.SSLError, OSError) as error:
            if getattr(error, "reason", None) == "DH_KEY_TOO_SMALL":
                # GnuTLS takes any; here such a group is not used, and there are better ways to agree.
                return
            reason = "decoding error" if b"-----BEGIN DH PARAMETERS" in data else "unexpected header error"
            raise Error(f"Unable to load DH parameters from {path}: Base64 {reason}.") from None

    def get(self, name: str) -> Any:
        """The value of a property."""
        return self._values[name]

    def set(self, name: str, value: Any) -> None:
        """Set a property.  As in QEMU what was read when the object was made stays."""
        self._values[name] = value
        if name == "verify-peer":
            self._set_verification()


class X509Credentials(TLSCredentials):
    """The object type "tls-creds-x509"."""

    qom_type = "tls-creds-x509"
    struct = "TlsCredsX509Properties"
    _defaults: Mapping[str, Any] = {"sanity-check": True, "passwordid": ""}

    def _set_verification(self) -> None:
        if self._context is not None:
            verify = self._values["verify-peer"]
            self._context.check_hostname = verify and self._loaded_for == "client"
            self._context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE

    def _load(self, secrets: Callable[[str], KeyBuffer]) -> ssl.SSLContext:
        side = self._values["endpoint"]
        authority = self._required(_CA_CERTIFICATE)
        revocations = self._optional(_CA_REVOCATIONS)
        certificate: str | None
        key: str | None
        if side == "server":
            certificate, key = self._required("server-cert.pem"), self._required("server-key.pem")
        else:
            # A client has one only if the server wants to know who it is.
            certificate, key = self._optional("client-cert.pem"), self._optional("client-key.pem")
        if self._values["sanity-check"]:
            _check(side, certificate, authority)
        context = self._new_context()
        self._load_authority(context, authority)
        # GnuTLS trusts whatever is in this file, also an authority that is below another one.
        context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
        if certificate is not None and key is not None:
            self._load_key(context, certificate, key, secrets)
        if revocations is not None:
            self._load_revocations(context, revocations)
        if side == "server":
            self._load_dh_parameters(context)
        return context

    def _load_authority(self, context: ssl.SSLContext, authority: str) -> None:
        what = f"Cannot load CA certificate '{authority}'"
        try:
            if b"-----BEGIN" not in Path(authority).read_bytes():
                # GnuTLS is content with a file that has none; then nobody is trusted.
                return
            context.load_verify_locations(authority)
        except ssl.SSLError:
            raise Error(f"{what}: Base64 unexpected header error.") from None
        except OSError:
            raise Error(f"{what}: {_UNREADABLE}") from None

    def _load_revocations(self, context: ssl.SSLContext, revocations: str) -> None:
        what = f"Cannot load CRL '{revocations}'"
        try:
            # A certificate in this file would be one more to trust.
            if (
                b"-----BEGIN X509 CRL" not in (data := Path(revocations).read_bytes())
                or b"BEGIN CERT" in data
            ):
                raise Error(f"{what}: Base64 decoding error.")
            context.load_verify_locations(revocations)
        except ssl.SSLError:
            raise Error(f"{what}: Base64 decoding error.") from None
        except OSError:
            raise Error(f"{what}: {_UNREADABLE}") from None
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _load_key(
        self, context: ssl.SSLContext, certificate: str, key: str, secrets: Callable[[str], KeyBuffer]
    ) -> None:
        password_id = self._values["passwordid"]
        password = bytearray()
        if "passwordid" in self._given:
            with secrets(password_id) as secret:
                # Python's ssl takes no other buffer.
                password += secret.data
        try:
            # With a function even if there is no password: OpenSSL would ask for one at the terminal.
            context.load_cert_chain(certificate, key, password=lambda: password)
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = _key_error(error, certificate, key)
            raise Error(f"Cannot load certificate '{certificate}' & key '{key}': {reason}") from None
        finally:
            password[:] = bytes(len(password))


class PreSharedKeys(TLSCredentials):
    """The object type "tls-creds-psk".

    Python can do it from 3.13 on; before, there is a clear refusal.
    """

    qom_type = "tls-creds-psk"
    struct = "TlsCredsPskProperties"
    _defaults: Mapping[str, Any] = {"username": ""}

    def _load(self, secrets: Callable[[str], KeyBuffer]) -> ssl.SSLContext:
        server = self._values["endpoint"] == "server"
        if server and "username" in self._given:
            raise Error("username should not be set when endpoint=server")
        path = self._required(_PRE_SHARED_KEYS)
        keys = read_pre_shared_keys(path)
        user = self._values["username"] or _PSK_USER
        if not server and user not in keys:
            raise Error(f"Username {user} not found in PSK file {path}")
        context = self._new_context()
        hook = getattr(context, f"set_psk_{self._values['endpoint']}_callback", None)
        if hook is None:
            version = ".".join(map(str, sys.version_info[:2]))
            raise Error(f"TLS with pre-shared keys needs Python 3.13 or later, and this is Python {version}")
        if not server:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("PSK")
        if server:
            hook(lambda identity: keys.get(identity or "", b""))
        else:
            hook(lambda hint: (user, keys[user]))
        return context


class Anonymous(TLSCredentials):
    """The object type "tls-creds-anon": what is said is secret, and nobody knows to whom.

    The two sides agree on a key by Diffie and Hellman's way without any proof of who they are, which
    TLS has up to version 1.2.
    """

    qom_type = "tls-creds-anon"
    struct = "TlsCredsAnonProperties"
    _needs_directory = False

    def _load(self, secrets: Callable[[str], KeyBuffer]) -> ssl.SSLContext:
        context = self._new_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # OpenSSL's level 1 already means to know the other side.
        context.set_ciphers("ADH+AES:@SECLEVEL=0")
        if self._values["endpoint"] == "server":
            # OpenSSL reads them from a file only.
            with open(os.memfd_create("dh-params"), "wb", buffering=0) as parameters:
                parameters.write(_FFDHE2048)
                context.load_dh_params(f"/proc/self/fd/{parameters.fileno()}")
            if "dir" in self._given:
                self._load_dh_parameters(context)
        return context


#: Versions of TLS that can be spoken, oldest first, as GnuTLS calls them.
_TLS_VERSIONS: Final[Mapping[str, ssl.TLSVersion]] = {
    "VERS-TLS1.2": ssl.TLSVersion.TLSv1_2,
    "VERS-TLS1.3": ssl.TLSVersion.TLSv1_3,
}


def _versions(priority: str) -> tuple[ssl.TLSVersion, ssl.TLSVersion]:
    """The oldest and the newest version that a GnuTLS priority string leaves.

    Of such a string, keywords with colons between, only the versions are looked at ("Priority
    Strings" in GnuTLS's manual): ``-VERS-TLS1.3`` takes one away, ``+VERS-TLS1.3`` adds one,
    ``VERS-ALL`` and ``VERS-TLS-ALL`` are all of them, and after ``NONE`` there is none.

    :raise Error: if that is none at all.
    """
    left = set(_TLS_VERSIONS)
    for number, word in enumerate(priority.split(":")):
        if not number and word == "NONE":
            left.clear()
        name = word[1:]
        meant = set(_TLS_VERSIONS) if name in ("VERS-ALL", "VERS-TLS-ALL") else {name} & set(_TLS_VERSIONS)
        match word[:1]:
            case "-" | "!":
                left -= meant
            case "+":
                left |= meant
    if not left:
        raise Error(f"Priority '{priority}' leaves no version of TLS: it has to be 1.2 or 1.3")
    versions = [version for name, version in _TLS_VERSIONS.items() if name in left]
    return versions[0], versions[-1]


def _inaccessible(path: str, error: Exception) -> Error:
    reason = error.strerror if isinstance(error, OSError) else "Invalid argument"
    return Error(f"Unable to access credentials {path}: {reason}")


def _authorizing(authorized: Callable[[str], bool]) -> type[ssl.SSLObject]:
    """A side of a connection that is only made with those who are authorized.

    :param authorized: tells it from the name in the client's certificate, which is empty without one.
    """

    class Authorizing(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert(binary_form=True)
            identity = distinguished_name(certificate) if certificate else ""
            if not authorized(identity):
                raise ssl.SSLError(f"TLS x509 authz check for {identity} is denied")

    return Authorizing


def read_pre_shared_keys(path: str) -> dict[str, bytes]:
    """The keys in a file, by the clients' names.

    :raise Error: if it can't be read, or a line is no name with a key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid UTF-8"
        raise Error(f"Unable to read {path}: {reason}") from None
    keys = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        match = _KEY_LINE.fullmatch(line)
        if match is None:
            # Without the line, which holds a key.
            raise Error(f"Line {number} of {path} is not NAME:KEY with the key in hexadecimal digits")
        keys[match[1]] = bytes.fromhex(match[2])
    return keys


def distinguished_name(certificate: bytes) -> str:
    """The name of a certificate's subject, as rules in an `authz-list` are compared with.

    That is RFC 4514's form with the parts in the certificate's order, as GnuTLS writes it.

    :param certificate: in DER.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    subject = x509.load_der_x509_certificate(certificate).subject
    return ",".join(part.rfc4514_string({NameOID.EMAIL_ADDRESS: "EMAIL"}) for part in subject.rdns)


#: GnuTLS says no more about it.
_UNREADABLE: Final = "Error while reading file."


def _key_error(error: Exception, certificate: str, key: str) -> str:
    """Why a certificate and its key could not be loaded, in GnuTLS's words."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        named, secret = Path(certificate).read_bytes(), Path(key).read_bytes()
    except OSError:
        return _UNREADABLE
    if b"ENCRYPTED" in secret:
        return "Decryption has failed."
    if b"PRIVATE KEY-----" not in secret:
        return "The requested data were not available."
    try:
        own = load_pem_private_key(secret, None)
    except (ValueError, TypeError):
        return "Base64 decoding error."
    try:
        signed = x509.load_pem_x509_certificate(named)
    except ValueError:
        beginning = b"-----BEGIN CERTIFICATE-----" in named
        return "Base64 unexpected header error." if beginning else "Base64 decoding error."
    if signed.public_key() != own.public_key():
        return "The certificate and the given key do not match."
    return f"OpenSSL does not take it: {getattr(error, 'reason', None) or error}"


# -- looking at certificates


def _check(side: str, certificate: str | None, authority: str) -> None:
    """See that the certificates can be used for what they are for.

    :param side: "server" or "client".
    :param certificate: the file of the side's own one.
    :param authority: the file of those that sign.
    :raise Error: in QEMU's words.
    """
    # Imported here, because it takes long and most daemons have no certificates.
    from cryptography import x509

    own: x509.Certificate | None = None
    if certificate is not None:
        try:
            own = x509.load_pem_x509_certificate(_read(certificate, _cannot_load(certificate)))
        except ValueError:
            reason = "Base64 unexpected header error."
            raise Error(f"Unable to import {side} certificate {certificate}: {reason}") from None
    try:
        signers = x509.load_pem_x509_certificates(_read(authority, _cannot_load(authority)))
    except ValueError:
        raise Error(f"Unable to import CA certificate list {authority}") from None
    if own is not None and certificate is not None:
        _check_one(own, certificate, side)
    for signer in signers:
        _check_one(signer, authority, "CA")
    if own is not None and not any(_issued(own, signer) for signer in signers):
        raise Error(
            f"Our own certificate {certificate} failed validation against {authority}: "
            "The certificate hasn't got a known issuer"
        )


def _cannot_load(path: str) -> str:
    # Said of any certificate, also where it is no authority's.
    return f"Cannot load CA cert list {path}: "


def _read(path: str, what: str) -> bytes:
    """A file's bytes.

    :param what: the beginning of a message.
    :raise Error: if it can't be read, in GLib's words.
    """
    failed = "Failed to open file"
    try:
        with Path(path).open("rb", buffering=0) as file:
            failed = "Error reading file"
            return file.readall()
    except IsADirectoryError as error:
        # Python refuses to open it already.
        raise Error(f"{what}Error reading file “{path}”: {error.strerror}") from None
    except OSError as error:
        raise Error(f"{what}{failed} “{path}”: {error.strerror}") from None


def _check_one(certificate: x509.Certificate, path: str, role: str) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < now:
        raise Error(f"The {role} certificate {path} has expired")
    if certificate.not_valid_before_utc > now:
        raise Error(f"The {role} certificate {path} is not yet active")
    constraints = _extension(certificate, path, x509.BasicConstraints)
    if role == "CA" and constraints is None:
        raise Error(f"The certificate {path} is missing basic constraints for a CA")
    if role == "CA" and not constraints.value.ca:
        raise Error(f"The certificate {path} basic constraints do not show a CA")
    if role != "CA" and constraints is not None and constraints.value.ca:
        raise Error(f"The certificate {path} basic constraints show a CA, but we need one for a {role}")
    # What is not critical is advice.
    usage = _extension(certificate, path, x509.KeyUsage)
    if usage is not None and usage.critical:
        wanted = _CA_USAGE if role == "CA" else _USAGE
        for name, words in wanted:
            if not getattr(usage.value, name):
                raise Error(f"Certificate {path} usage does not permit {words}")
    purposes = None if role == "CA" else _extension(certificate, path, x509.ExtendedKeyUsage)
    if purposes is not None and purposes.critical:
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        if not {purpose, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(purposes.value):
            raise Error(f"Certificate {path} purpose does not allow use with a TLS {role}")


#: What a certificate's key has to be good for, in the words of messages.
_CA_USAGE: Final = (("key_cert_sign", "certificate signing"),)
_USAGE: Final = (("digital_signature", "digital signature"), ("key_encipherment", "key encipherment"))


def _extension(certificate: x509.Certificate, path: str, kind: type[Any]) -> Any:
    """An extension of this kind, or None.

    :raise Error: if the extensions make no sense.
    """
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None
    except ValueError as error:
        raise Error(f"The certificate {path} can't be read: {error}") from None


def _issued(certificate: x509.Certificate, signer: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(signer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
