"""Where an image's backing image is: names, formats, and what kind of image a file holds.

An image that holds only what is different from another one names that other
one, its *backing image*, in its own header: a file name, with or without a
format.  A name is relative to the directory of the image it stands in; a
prefix before a colon stands for a protocol; `json:` is followed by options
as `blockdev-add` takes them.  This module turns such names into options; the
graph opens them (:meth:`qmpd.block.graph.Graph.add`).
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qjson import JSONError, parse_json

#: The most images that may lie behind one.  Each takes its turn on the way of a request.
LONGEST_CHAIN: Final = 200

#: How many bytes from an image's beginning are looked at to find out its format.
PROBE_BYTES: Final = 2048

_JSON: Final = "json:"
_FILE: Final = "file:"

#: What images of a format have at an offset.  Those that no driver is there for are listed as
#: well, so that such an image is refused and not served as if it were the disk itself.
_SIGNATURES: Final[tuple[tuple[str, int, bytes], ...]] = (
    ("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("luks", 0, b"LUKS\xba\xbe\0\x01"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
)


def probe(beginning: bytes) -> str:
    """The format of an image, from its first `PROBE_BYTES` bytes; what has no signature is raw."""
    for name, offset, signature in _SIGNATURES:
        if beginning.startswith(signature, offset):
            return name
    return "raw"


def has_protocol(name: str) -> bool:
    """Whether a file name begins with a protocol: a colon stands before any slash."""
    return ":" in name.partition("/")[0]


def full_name(overlay: str | None, name: str) -> str:
    """A backing file's name, as one that can be opened.

    :param overlay: the file name of the image in whose header `name` stands; None if it has none.
    :raise Error: if the name is relative to nothing.
    """
    if has_protocol(name) or name.startswith("/"):
        return name
    if overlay is None:
        raise Error(f"Cannot use relative backing file names for '{name}'")
    return posixpath.join(posixpath.dirname(overlay), name)


def options_for(name: str, image_format: str | None) -> dict[str, Any]:
    """The options that open a backing image.

    :param name: its full name.
    :param image_format: the driver that the header names, or None.
    :returns: BlockdevOptions, not validated; without "driver" if the format has to be found out.
    :raise Error: if the name makes no sense or needs a protocol that is not there.
    """
    if name.startswith(_JSON):
        options = _json_options(name)
    elif has_protocol(name) and not name.startswith(_FILE):
        raise Error(f"Unknown protocol '{name.partition(':')[0]}'")
    else:
        # "file:" leaves no choice.
        driver = "file" if name.startswith(_FILE) else _protocol_driver(name)
        options = {"file": {"driver": driver, "filename": name.removeprefix(_FILE)}}
    return options if image_format is None else {**options, "driver": image_format}


def _protocol_driver(filename: str) -> str:
    """The driver that opens a file of the host: devices have one of their own."""
    try:
        mode = os.stat(filename).st_mode
    except OSError:
        # Let the driver say what is wrong.
        return "file"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def _json_options(name: str) -> dict[str, Any]:
    try:
        options = parse_json(name.removeprefix(_JSON))
    except JSONError as error:
        raise Error(f"Could not parse the JSON options: {error.desc}") from None
    if not isinstance(options, dict):
        raise Error("Invalid JSON object given")
    return _nested(options)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which ``"file.driver"`` may stand for a member of "file"."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        first, _, rest = key.partition(".")
        member = {rest: value} if rest else value
        before = result.get(first)
        if isinstance(member, Mapping):
            if before is not None and not isinstance(before, dict):
                raise Error(f"Cannot mix scalar and non-scalar keys: '{first}'")
            result[first] = {**(before or {}), **_nested(member)}
        else:
            result[first] = member
    # What came in pieces is put together a level at a time.
    return {key: _nested(value) if isinstance(value, dict) else value for key, value in result.items()}


def validated(
    options: dict[str, Any], validate: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Options out of an image's header, as `validate` returns them.

    The "format" of a qcow2 image's encryption may be missing there, because that image says it itself;
    afterwards it is missing still.
    """
    unsaid = list(_without_format(options, ()))
    for path in unsaid:
        _member(options, path)["format"] = "luks"
    options = validate(options)
    for path in unsaid:
        del _member(options, path)["format"]
    return options


def _without_format(options: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths to the encryptions, at any depth, that lack it."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            if name != "encrypt" or options.get("driver") != "qcow2":
                yield from _without_format(value, (*path, name))
            elif "format" not in value:
                yield *path, name


def _member(options: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        options = options[name]
    return options
