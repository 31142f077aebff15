"""JSON as QEMU reads it, with its limits, its wording and its ways of going on after an error.

There is one lexer and one assembler of values.  On them stand the two ways of
reading: a stream that arrives in pieces (:class:`JSONStream`), and a whole text
(:func:`parse_json` for one value, :func:`located` for any number).
"""

from __future__ import annotations

from qmpd.qjson.stream import JSONStream
from qmpd.qjson.text import Located, located, parse_json
from qmpd.qjson.values import JSONError

__all__ = ["JSONError", "JSONStream", "Located", "located", "parse_json"]
