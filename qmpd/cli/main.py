"""The program ``qmpd``: from the command line to a running daemon, and its exit status.

The arguments are read twice, as qemu-storage-daemon does: once for what does
not exist, ``--help``, ``--version`` and ``--daemonize``; then, in the order
given, to make what they ask for, so that everything an option refers to has to
stand before it.  Whatever is wrong ends the program with status 1 and one line
on standard error that names the option.

Importing this is cheap on purpose: the daemon and its dependencies are only
imported once a daemon is to be started.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final

from qmpd import __version__
from qmpd.cli import options
from qmpd.cli.options import Answered, Option
from qmpd.cli.process import exit_status, read_settings, run_daemon

PROGRAM: Final = "qmpd"

#: Commands beside the daemon, and the modules whose ``run(arguments) -> int`` they are.
SUBCOMMANDS: Final[Mapping[str, str]] = {
    "check": "qmpd.cli.check",
    "demo": "qmpd.cli.demo",
    "schema": "qmpd.cli.schema",
}

HELP: Final = """\
Usage: qmpd [OPTION]...
       qmpd demo | schema | check FILE

A storage daemon that speaks QMP.  Options are taken in the order given, in
the spelling of qemu-storage-daemon: VALUE is key=value,... with commas doubled
inside values, or a JSON object.

Monitors, where clients connect:
  --qmp unix:PATH,server=on,wait=off
  --qmp tcp:HOST:PORT,server=on,wait=off
  --qmp stdio              a QMP monitor, in one option
  --chardev socket,id=ID,path=PATH | host=HOST,port=PORT | fd=FD
            [,server=on|off][,wait=on|off][,abstract=on|off]
            [,mode=OCTAL][,group=NAME][,users=NAME:...][,groups=NAME:...]
                           a UNIX or TCP socket, or an inherited descriptor;
                           mode (default: 0600) and group are those of a UNIX
                           socket's file, users and groups may connect to it
  --chardev stdio,id=ID    standard input and output
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
                           speak QMP on that character device

What the daemon starts with:
  --object TYPE,id=ID[,PROPERTY=VALUE]...
                           an object; `--object help' lists the types,
                           `--object TYPE,help' their properties
  --blockdev DRIVER,node-name=NAME[,OPTION=VALUE]...
                           a block node
  --device DRIVER[,id=ID][,PROPERTY=VALUE]...
                           a device that uses a block node
  --nbd-server addr.type=unix,addr.path=PATH |
               addr.type=inet,addr.host=HOST,addr.port=PORT
               [,tls-creds=ID][,tls-authz=ID][,max-connections=N]
                           the NBD server
  --export nbd,id=ID,node-name=NAME[,name=NAME][,writable=on|off]
                           serve a block node to NBD clients
  --device-exports on|off  serve every disk that is plugged in from here on to
                           NBD clients, under its device's id (default: off)

The process:
  --pidfile PATH           write the process id to PATH; removed on exit
  --daemonize              go to the background once everything is ready
  --cipher-processes N     processes that cipher long requests beside the
                           daemon: a number, or auto (default) for one less
                           than there are processors, and at most 4
  --pbkdf-memory-max SIZE  memory that deriving keys from passphrases may take
                           at a time, such as 512M: LUKS2 headers that want
                           more are refused (default: half of the machine's,
                           and at most 4G)
  --log LEVEL              error, warning (default), info or debug
  --loop LOOP              auto (default), uvloop or asyncio
  -T, --trace VALUE        accepted; there are no trace events
  -h, --help               show this and exit
  -V, --version            show the version and exit

Other commands:
  qmpd demo                plug an encrypted disk with a detached header, with
                           every request and reply shown
  qmpd schema              print the wire types as JSON Schema
  qmpd check FILE          check QMP commands without running them

Sockets passed by systemd become monitors by themselves.

Examples:
  qmpd --qmp unix:/run/qmpd.sock,server=on,wait=off

  qmpd --object secret,id=key0,file=/etc/keys/disk0 \\
       --blockdev file,node-name=header,filename=/vol1/header.img \\
       --blockdev file,node-name=payload,filename=/vol2/payload.raw \\
       --blockdev luks,node-name=disk0,file=payload,header=header,\\
key-secret=key0 \\
       --chardev socket,id=mon,path=/run/qmpd.sock,server=on,wait=off \\
       --monitor chardev=mon --pidfile /run/qmpd.pid --daemonize
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    :param arguments: without the program's name; those of the process if None.
    :return: the exit status: 0, or 1 after a line, and perhaps a hint below it, on standard error.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(PROGRAM, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in SUBCOMMANDS:
        status: int = import_module(SUBCOMMANDS[arguments[0]]).run(arguments[1:])
        return status
    found = _first_pass(arguments)
    return run_daemon(PROGRAM, lambda: read_settings(found), found)


def _first_pass(arguments: Sequence[str]) -> list[Option]:
    """Return the options, all of which exist.

    :raise Answered: ``--help`` and ``--version`` come before whatever is wrong behind them.
    """
    found = []
    for option in options.scan(arguments):
        if option.name == "help":
            raise Answered(HELP.rstrip("\n"))
        if option.name == "version":
            raise Answered(f"{PROGRAM} version {__version__}")
        found.append(option)
    return found
