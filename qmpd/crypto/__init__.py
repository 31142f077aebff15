"""Bytes in, bytes out: sector ciphers, key derivation, the anti-forensic splitter, LUKS headers.

Nothing here opens a file or knows an event loop.  The primitives (AES, the
hashes, PBKDF2) are those of the ``cryptography`` package, and argon2 is that of
``argon2-cffi``; what is ours is how they are put together: IV rules, XTS over
many sectors at once, and formats.
"""
