"""Bytes in, bytes out: sector ciphers, key derivation, the anti-forensic splitter, LUKS1 headers.

Nothing here opens a file or knows an event loop.  The primitives (AES, the
hashes, PBKDF2) are those of the ``cryptography`` package; what is ours is how
they are put together: IV rules, XTS over many sectors at once, and formats.
"""
