"""Character devices on the command line: ``--chardev`` and ``--qmp``.

QEMU reads these in a dialect of its own, :mod:`qmpd.qapi.settings`.
:func:`chardev_config` and :func:`monitor_shortcut` say what is then to be
opened; they open nothing.

Learnt from ``qemu-storage-daemon``'s behaviour and errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from qmpd.errors import Error
from qmpd.monitor.chardev import ChardevConfig
from qmpd.qapi.settings import Kind, parse_settings

#: What the settings of QEMU's character devices hold, of whatever kind.
_KINDS_OF_SETTINGS: Final[Mapping[Kind, str]] = {
    Kind.TEXT: """
        backend chardev chardevs.0 chardevs.1 chardevs.2 chardevs.3 fd host input-path localaddr localport
        logfile name path port tls-authz tls-creds
        mode group users groups
    """,
    Kind.SWITCH: """
        abstract append clipboard delay ipv4 ipv6 logappend mouse mux nodelay server signal telnet tight
        tn3270 wait websocket
    """,
    Kind.NUMBER: "cols debug height reconnect reconnect-ms rows to width",
    Kind.SIZE: "size",
}

#: Every setting there is; ``mode``, ``group``, ``users`` and ``groups`` are ours.  One that belongs to
#: another kind of character device is ignored, as QEMU does; one that belongs to none is an error.
CHARDEV_SETTINGS: Final[Mapping[str, Kind]] = {
    name: kind for kind, names in _KINDS_OF_SETTINGS.items() for name in names.split()
}

#: The kinds there are.
CHARDEV_KINDS: Final = ("null", "ringbuf", "socket", "stdio")

#: What QEMU's sockets can do and ours cannot: refused, because leaving it out would change what is promised.
UNSUPPORTED: Final = (
    "ipv4",
    "ipv6",
    "logfile",
    "mux",
    "reconnect",
    "reconnect-ms",
    "telnet",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "to",
    "websocket",
)


def chardev_config(text: str) -> ChardevConfig:
    """Return what ``--chardev`` describes.

    :raise HelpRequested: the kinds are asked for.
    :raise Error: in QEMU's words where it has some.
    """
    settings = parse_settings(text, CHARDEV_SETTINGS, "backend")
    if "id" not in settings:
        raise Error("chardev: no id specified")
    if "backend" not in settings:
        raise Error(f'chardev: "{settings["id"]}" missing backend')
    return _config(settings)


def _config(settings: Mapping[str, Any]) -> ChardevConfig:
    if settings["backend"] not in CHARDEV_KINDS:
        raise Error(f"'{settings['backend']}' is not a valid char driver name")
    for name in UNSUPPORTED:
        if settings.get(name):
            raise Error(f"Parameter '{name}' is not supported by qmpd")
    if settings["backend"] == "ringbuf" and settings.get("size", 1).bit_count() != 1:
        raise Error("size of ringbuf chardev must be power of two")
    if settings["backend"] != "socket":
        return ChardevConfig(id=settings["id"], kind=settings["backend"])
    server = settings.get("server", False)
    if not server and "wait" in settings:
        raise Error("'wait' option is incompatible with socket in client connect mode")
    if len(settings.keys() & {"path", "fd", "host"}) > 1:
        raise Error("None or one of 'path', 'fd' or 'host' option required.")
    if "host" in settings and "port" not in settings:
        raise Error("chardev: socket: no port given")
    path, host, port, descriptor = _address(settings)
    return ChardevConfig(
        id=settings["id"],
        kind="socket",
        path=path,
        host=host,
        port=port,
        server=server,
        wait=server and settings.get("wait", True),
        fd=descriptor,
        mode=_mode(settings.get("mode")),
        group=settings.get("group"),
        users=_names("users", settings),
        groups=_names("groups", settings),
    )


def _address(settings: Mapping[str, Any]) -> tuple[str | None, str | None, str | None, int | None]:
    """Return path, host, port and descriptor, of which one address is made."""
    if "path" in settings:
        path = settings["path"]
        if settings.get("abstract"):
            # A name that starts with a zero byte, here as in Python's sockets; unless it is tight, more of
            # them fill it up to the size of sun_path, as some programs have it.
            path = "\0" + path if settings.get("tight", True) else ("\0" + path).ljust(108, "\0")
        return path, None, None, None
    if "host" in settings:
        return None, settings["host"], settings["port"], None
    number = settings.get("fd", "")
    if not re.fullmatch(r"-?[0-9]{1,9}", number):
        raise Error(f"Unable to parse FD number {number}")
    return None, None, None, int(number)


def _mode(digits: str | None) -> int | None:
    if digits is None:
        return None
    if not re.fullmatch(r"[0-7]{1,4}", digits):
        raise Error(f"Parameter 'mode' expects octal digits such as 0660, not '{digits}'")
    return int(digits, 8)


def _names(key: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names or numbers of ``users=`` and ``groups=``, which colons separate."""
    if key not in settings:
        return ()
    names = tuple(settings[key].split(":"))
    if not all(names):
        raise Error(f"Parameter '{key}' expects names or numbers separated by colons")
    return names


#: What may follow ``--qmp``; a numeric IPv6 address stands in brackets.
_SHORTCUT: Final = re.compile(
    r"""(?: unix:(?P<path>(?:[^,]|,,)*)
          | tcp:(?:\[(?P<bracketed>[^],]*)\]|(?P<host>[^:,]*)):(?P<port>[^:,]+)
          | (?:mon:)?(?P<bare>stdio|null)
        )
        (?:,(?P<rest>.*))?\Z""",
    re.VERBOSE | re.DOTALL,
)


def monitor_shortcut(text: str, index: int) -> ChardevConfig:
    """Return the character device of ``--qmp unix:PATH,...``, ``tcp:HOST:PORT,...``, ``stdio`` or ``null``.

    :param index: how many such options came before; it makes the id that QEMU makes.
    :raise Error: in QEMU's words where it has some.
    """
    found = _SHORTCUT.match(text)
    if found is None:
        raise Error(f"'{text}' is not a valid char driver: unix:PATH, tcp:HOST:PORT or stdio is expected")
    settings = parse_settings(found["rest"] or "", CHARDEV_SETTINGS)
    settings |= {"id": f"compat_monitor{index}", "backend": found["bare"] or "socket"}
    if found["path"] is not None:
        settings["path"] = found["path"].replace(",,", ",")
    elif found["port"] is not None:
        settings |= {"host": found["bracketed"] or found["host"] or "", "port": found["port"]}
    return _config(settings)
