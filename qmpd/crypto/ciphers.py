"""What a sector cipher is made of, and what it is called in a header and in QAPI.

A LUKS1 header names a cipher twice: ``cipher-name`` ("aes") and
``cipher-mode`` ("xts-plain64", "cbc-essiv:sha256"), and gives the key's length
beside them (LUKS1 On-Disk Format Specification 1.2.3, section 3 and its table
of valid names).  QAPI names the same thing by four words: ``cipher-alg``
("aes-256"), ``cipher-mode`` ("xts"), ``ivgen-alg`` ("plain64") and
``ivgen-hash-alg`` ("sha256").  :class:`CipherSpec` is the one form inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from qmpd.crypto import digests
from qmpd.errors import Error

#: AES key bytes of each ``cipher-alg``.
ALGORITHMS: Final[Mapping[str, int]] = MappingProxyType({"aes-128": 16, "aes-192": 24, "aes-256": 32})

#: How many AES keys the volume key holds in each ``cipher-mode`` (IEEE 1619, section 5.1: two for XTS).
MODES: Final[Mapping[str, int]] = MappingProxyType({"xts": 2, "cbc": 1})

#: The rules that turn a sector's number into its IV.
IV_GENERATORS: Final = ("plain", "plain64", "essiv")


@dataclass(frozen=True)
class CipherSpec:
    """A sector cipher: algorithm, mode and IV rule.

    :param algorithm: "aes-128", "aes-192" or "aes-256".  (AES-192-XTS, which
        IEEE 1619 does not define, is what QEMU makes of aes-192 with xts.)
    :param mode: "xts" or "cbc".
    :param ivgen: "plain" (32 bit sector number), "plain64" or "essiv".
    :param ivgen_hash: the hash of essiv.  QEMU and cryptsetup let a header
        name one beside the other rules too, where it means nothing; it is
        kept so that such a header is written back as it was.
    :raise Error: a name that is not supported, or an essiv hash whose length
        is no AES key's, in QEMU's wording.
    """

    algorithm: str
    mode: str
    ivgen: str
    ivgen_hash: str | None = None

    def __post_init__(self) -> None:
        if self.ivgen_hash is not None:
            digests.algorithm(self.ivgen_hash)
        if self.mode not in MODES:
            raise Error(f"Cipher mode '{self.mode}' not supported")
        if self.algorithm not in ALGORITHMS:
            raise Error(f"Algorithm '{self.algorithm}' not supported")
        if self.ivgen not in IV_GENERATORS:
            raise Error(f"IV generator '{self.ivgen}' not supported")
        if self.ivgen == "essiv":
            if self.ivgen_hash is None:
                raise Error("Missing IV generator hash specification")
            size = digests.algorithm(self.ivgen_hash).digest_size
            if size not in ALGORITHMS.values():
                raise Error(f"No AES cipher with key size {size} available")

    @property
    def key_bytes(self) -> int:
        """Length of the volume key in bytes: in XTS, of both keys together."""
        return ALGORITHMS[self.algorithm] * MODES[self.mode]

    @classmethod
    def from_header(
        cls, cipher_name: str, cipher_mode: str, key_bytes: int, hash_name: str | None = None
    ) -> CipherSpec:
        """Read the names of a LUKS1 header, as in ``("aes", "cbc-essiv:sha256", 32)``.

        :param key_bytes: the volume key's length, which tells the AES variants apart.
        :param hash_name: the header's hash, if given, is checked too: in its
            turn, so that of several wrong names QEMU's first is complained of.
        :raise Error: see the class.
        """
        mode, dash, iv_rule = cipher_mode.partition("-")
        if not dash:
            raise Error(f"Unexpected cipher mode string format '{cipher_mode}'")
        ivgen, colon, after_colon = iv_rule.partition(":")
        ivgen_hash = after_colon if colon else None
        if ivgen_hash is not None:
            digests.algorithm(ivgen_hash)
        keys = MODES.get(mode)
        if keys is None:
            raise Error(f"Cipher mode '{mode}' not supported")
        aes_key_bytes = key_bytes // keys
        algorithm = next((name for name, size in ALGORITHMS.items() if size == aes_key_bytes), None)
        if cipher_name != "aes" or algorithm is None:
            raise Error(f"Algorithm '{cipher_name}' with key size {aes_key_bytes} bytes not supported")
        if hash_name is not None:
            digests.algorithm(hash_name)
        spec = cls(algorithm, mode, ivgen, ivgen_hash)
        if key_bytes % keys:
            raise Error("XTS cipher key length should be a multiple of 2")
        return spec

    @classmethod
    def from_options(
        cls,
        cipher_alg: str | None = None,
        cipher_mode: str | None = None,
        ivgen_alg: str | None = None,
        ivgen_hash_alg: str | None = None,
    ) -> CipherSpec:
        """Take QAPI's words of a creation; those left out get QEMU's defaults.

        The defaults are aes-256, xts, plain64, and sha256 as the hash of essiv.

        :raise Error: see the class.
        """
        ivgen = ivgen_alg or "plain64"
        ivgen_hash = ivgen_hash_alg or ("sha256" if ivgen == "essiv" else None)
        return cls(cipher_alg or "aes-256", cipher_mode or "xts", ivgen, ivgen_hash)

    def header_names(self) -> tuple[str, str]:
        """Return ``(cipher-name, cipher-mode)`` as a header spells them: ``("aes", "xts-plain64")``."""
        suffix = f":{self.ivgen_hash}" if self.ivgen_hash is not None else ""
        return "aes", f"{self.mode}-{self.ivgen}{suffix}"
