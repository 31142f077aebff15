from __future__ import annotations

import pytest

from qmpd.crypto.ciphers import CipherSpec
from qmpd.errors import Error


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("aes", "xts-plain64", 64), CipherSpec("aes-256", "xts", "plain64")),
        (("aes", "xts-plain", 32), CipherSpec("aes-128", "xts", "plain")),
        (("aes", "xts-plain64", 48), CipherSpec("aes-192", "xts", "plain64")),
        (("aes", "cbc-essiv:sha256", 24), CipherSpec("aes-192", "cbc", "essiv", "sha256")),
        (("aes", "xts-plain64:sha1", 64), CipherSpec("aes-256", "xts", "plain64", "sha1")),
    ],
)
def test_a_headers_names_are_read_and_written_alike(names: tuple[str, str, int], spec: CipherSpec) -> None:
    assert CipherSpec.from_header(*names) == spec
    assert spec.header_names() == names[:2]
    assert spec.key_bytes == names[2]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("aes", "xts", 64), "Unexpected cipher mode string format 'xts'"),
        (("aes", "", 64), "Unexpected cipher mode string format ''"),
        (("aes", "xts-", 64), "IV generator '' not supported"),
        (("aes", "-plain64", 64), "Cipher mode '' not supported"),
        (("aes", "lrw-benbi", 64), "Cipher mode 'lrw' not supported"),
        (("aes", "xts-plain65", 64), "IV generator 'plain65' not supported"),
        (("aes", "xts-plain64-foo", 64), "IV generator 'plain64-foo' not supported"),
        (("aes", "xts-plain64:", 64), "Hash algorithm '' not supported"),
        (("aes", "lrw-benbi:foo", 64), "Hash algorithm 'foo' not supported"),
        (("aes", "xts-essiv", 64), "Missing IV generator hash specification"),
        (("aes", "xts-essiv:sha1", 64), "No AES cipher with key size 20 available"),
        (("aes", "cbc-essiv:sha512", 32), "No AES cipher with key size 64 available"),
        (("AES", "xts-plain64", 64), "Algorithm 'AES' with key size 32 bytes not supported"),
        (("aes", "xts-plain64", 63), "Algorithm 'aes' with key size 31 bytes not supported"),
        (("aes", "cbc-plain64", 64), "Algorithm 'aes' with key size 64 bytes not supported"),
        (("aes", "xts-plain64", 33), "XTS cipher key length should be a multiple of 2"),
    ],
)
def test_unknown_names_are_refused_in_qemus_words(names: tuple[str, str, int], text: str) -> None:
    with pytest.raises(Error) as caught:
        CipherSpec.from_header(*names)
    assert caught.value.desc == text


def test_of_several_wrong_names_qemus_first_is_told() -> None:
    def refusal(cipher_name: str, cipher_mode: str) -> str:
        with pytest.raises(Error) as caught:
            CipherSpec.from_header(cipher_name, cipher_mode, 64, "nohash")
        return caught.value.desc

    assert refusal("aesx", "xts-benbi").startswith("Algorithm 'aesx'")
    assert refusal("aes", "xts-benbi") == "Hash algorithm 'nohash' not supported"
    assert refusal("aes", "lrw-benbi") == "Cipher mode 'lrw' not supported"


def test_what_a_creation_leaves_out_gets_qemus_defaults() -> None:
    assert CipherSpec.from_options() == CipherSpec("aes-256", "xts", "plain64")
    essiv = CipherSpec.from_options("aes-128", "cbc", "essiv")
    assert essiv.header_names() == ("aes", "cbc-essiv:sha256")


def test_a_creation_with_a_cipher_that_is_not_supported_is_refused() -> None:
    with pytest.raises(Error, match="^Algorithm 'des' not supported$"):
        CipherSpec.from_options(cipher_alg="des")
