"""The small language of the `qemu-io` program, on a backend.

One line is one command with options as in a shell: ``read -P 0x11 0 64k``.
What a command finds out, and also most of what goes wrong, is printed in the
program's own format, because people and scripts compare it; a line that can't
be understood is complained about on a second stream.  Only a refusal of the
permissions that a command needs is raised.

Requests of any length are served piece by piece, so memory does not grow with
the length that somebody types.
"""

from __future__ import annotations

import asyncio
import errno
import getopt
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final, TextIO

from qmpd.block.backend import Backend
from qmpd.block.permissions import Permission

#: Requests are done in pieces of this many bytes.
_PIECE: Final = 1 << 20

#: The longest request, in bytes: the largest multiple of a sector that fits into an int.
_REQUEST_MAX: Final = (1 << 31) - 512
_INT64_MAX: Final = (1 << 63) - 1

#: What `write` writes unless it is told something else.
_DEFAULT_PATTERN: Final = 0xCD

_SECTOR: Final = 512
_UNITS: Final = "KMGTPE"
_DUMP_WIDTH: Final = 16


class _Refusal(Exception):
    """A command line that asks for something impossible; the text is printed."""


class _Usage(Exception):
    """A command line that is not one: its usage is printed."""


class _PatternFileFailure(Exception):
    """A file that can't be a pattern; the text goes where complaints go."""


#: Gives so many bytes of what is to be written.
_Source = Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Command:
    """A command of the language.

    :param arguments: what it takes, and in a few words what it does.
    :param fewest: and `most`: how many words may follow it, options included.
    :param perm: what it needs on the node.
    """

    name: str
    abbreviation: str
    arguments: str
    summary: str
    fewest: int
    most: int | None
    perm: Permission
    run: Callable[[QemuIO, list[str]], Awaitable[None]]

    @property
    def usage(self) -> str:
        """One line about how to use it."""
        return f"{self.name} {self.arguments} -- {self.summary}\n"


class QemuIO:
    """Executes lines on one disk.

    :param backend: the disk.
    :param stdout: takes the results.
    :param stderr: takes complaints about lines that are no commands.
    """

    def __init__(self, backend: Backend, stdout: TextIO, stderr: TextIO) -> None:
        self._backend = backend
        self._stdout = stdout
        self._stderr = stderr

    async def execute(self, line: str) -> None:
        """Execute a line.

        :raise Error: if the disk does not give the permissions that the command needs,
            or can't do at all what it asks for.
        """
        words = line.split()
        if not words:
            return
        command = _BY_NAME.get(words[0])
        arguments = words[1:]
        if command is None:
            self._stderr.write(f'command "{words[0]}" not found\n')
        elif complaint := _count(command, len(arguments)):
            self._stderr.write(complaint)
        else:
            await self._run(command, arguments)
        self._stdout.flush()
        self._stderr.flush()

    async def _run(self, command: _Command, arguments: list[str]) -> None:
        backend = self._backend
        before = backend.perm
        if command.perm & ~before:
            backend.set_permissions(before | command.perm, backend.shared)
        try:
            await command.run(self, arguments)
        except _Refusal as refusal:
            self._stdout.write(f"{refusal}\n")
        except _Usage:
            self._stdout.write(command.usage)
        except _PatternFileFailure as failure:
            self._stderr.write(f"{failure}\n")
        except getopt.GetoptError as error:
            self._stderr.write(f"{command.name}: {_option_complaint(error)}\n")
            self._stdout.write(command.usage)
        except OSError as error:
            self._stdout.write(f"{command.name.removesuffix('v')} failed: {os.strerror(error.errno or 0)}\n")
        finally:
            if backend.perm != before:
                backend.set_permissions(before, backend.shared)

    # -- the commands

    async def read(self, arguments: list[str]) -> None:
        """Read, verify and dump."""
        options, words = _options(arguments, "bCpqrvP:s:l:")
        pattern = _pattern(options["-P"]) if "-P" in options else None
        if len(words) != 2:
            raise _Usage
        skip = _number(options.get("-s", "0"))
        checked = _number(options["-l"]) if "-l" in options else None
        if pattern is None and ("-s" in options or "-l" in options):
            raise _Usage
        offset, length = _number(words[0]), _length(words[1])
        if checked is None:
            checked = max(length - skip, 0)
        if skip + checked > length:
            raise _Refusal("pattern verification range exceeds end of read data")
        if "-b" in options:
            _check_sectors(words)
            raise _Refusal("read failed: Operation not supported")
        span = None if pattern is None else (pattern, skip, checked)
        await self._read(options, offset, length, span)

    async def readv(self, arguments: list[str]) -> None:
        """Read into several buffers, which are one here."""
        options, words = _options(arguments, "CqrvP:")
        if len(words) < 2:
            raise _Usage
        pattern = _pattern(options["-P"]) if "-P" in options else None
        offset, length = _number(words[0]), _vector_length(words[1:])
        await self._read(options, offset, length, None if pattern is None else (pattern, 0, length))

    async def _read(
        self, options: Mapping[str, str], offset: int, length: int, span: tuple[int, int, int] | None
    ) -> None:
        began = time.monotonic()
        same = True
        kept: list[bytes] = []
        for at, size in _pieces(offset, length, self._backend.size):
            data = await self._backend.pread(at, size, counted=False)
            if length <= _PIECE:
                kept.append(bytes(data))
            if span is not None:
                same = same and _matches(data, at - offset, *span)
        seconds = time.monotonic() - began
        if span is not None and not same:
            self._stdout.write(f"Pattern verification failed at offset {offset + span[1]}, {span[2]} bytes\n")
        if "-q" in options:
            return
        if "-v" in options:
            for at, size in _pieces(offset, length, self._backend.size):
                self._dump(kept[0] if kept else await self._backend.pread(at, size, counted=False), at)
        self._report("read", options, offset, length, seconds)

    async def write(self, arguments: list[str]) -> None:
        """Write a pattern, a file's contents over and over, or zeroes."""
        options, words = _options(arguments, "bcCfnpqruzP:s:")
        pattern = _pattern(options["-P"]) if "-P" in options else _DEFAULT_PATTERN
        if len(words) != 2:
            raise _Usage
        if "-b" in options and "-z" in options:
            raise _Refusal("-b and -z cannot be specified at the same time")
        if "-f" in options and ("-b" in options or "-c" in options):
            raise _Refusal("-f and -b or -c cannot be specified at the same time")
        for option in ("-n", "-u"):
            if option in options and "-z" not in options:
                raise _Refusal(f"{option} requires -z to be specified")
        if sum(option in options for option in ("-z", "-P", "-s")) > 1:
            raise _Refusal("Only one of -z, -P, and -s can be specified at the same time")
        offset = _number(words[0])
        length = _number(words[1]) if "-n" in options else _length(words[1], " without -n")
        if "-b" in options or "-c" in options:
            _check_sectors(words)
        if "-s" in options:
            with closing(await asyncio.to_thread(_PatternFile, options["-s"], length)) as file:
                await self._write(options, offset, length, file.read)
        else:
            source = None if "-z" in options else _fill(pattern, length)
            await self._write(options, offset, length, source)

    async def writev(self, arguments: list[str]) -> None:
        """Write from several buffers, which are one here."""
        options, words = _options(arguments, "CfqrP:")
        if len(words) < 2:
            raise _Usage
        pattern = _pattern(options["-P"]) if "-P" in options else _DEFAULT_PATTERN
        offset, length = _number(words[0]), _vector_length(words[1:])
        await self._write(options, offset, length, _fill(pattern, length))

    async def _write(
        self, options: Mapping[str, str], offset: int, length: int, source: _Source | None
    ) -> None:
        """Write what `source` gives, or zeroes.

        :raise OSError: ENOTSUP too: no node takes compressed data or keeps a machine's state.
        """
        began = time.monotonic()
        if "-b" in options:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        if source is None:
            for _ in _pieces(offset, length, self._backend.size):
                break
            await self._backend.write_zeroes(offset, length, unmap="-u" in options, counted=False)
        else:
            for at, size in _pieces(offset, length, self._backend.size):
                if "-c" in options:
                    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
                await self._backend.pwrite(at, await source(size), counted=False)
        if "-f" in options:
            await self._backend.flush(counted=False)
        self._finish("wrote", options, offset, length, time.monotonic() - began)

    async def discard(self, arguments: list[str]) -> None:
        """Give a range's space back."""
        options, words = _options(arguments, "Cq")
        if len(words) != 2:
            raise _Usage
        offset, length = _number(words[0]), _length(words[1])
        began = time.monotonic()
        for _ in _pieces(offset, length, self._backend.size):
            break
        await self._backend.discard(offset, length, counted=False)
        self._finish("discard", options, offset, length, time.monotonic() - began)

    async def flush(self, arguments: list[str]) -> None:
        """Bring to stable storage what was written."""
        await self._backend.flush(counted=False)

    async def truncate(self, arguments: list[str]) -> None:
        """Change the size."""
        options, words = _options(arguments, "m:")
        if len(words) != 1:
            raise _Usage
        mode = options.get("-m", "off")
        if mode not in ("off", "metadata", "falloc", "full"):
            self._stderr.write(f"qemu-io: Invalid preallocation mode '{mode}'\n")
            return
        await self._backend.truncate(_number(words[0]), mode)

    async def length(self, arguments: list[str]) -> None:
        """Print the size."""
        self._stdout.write(f"{_quantity(self._backend.size)}\n")

    async def help(self, arguments: list[str]) -> None:
        """Print how to use one or all commands."""
        if not arguments:
            self._stdout.write("".join(command.usage for command in _COMMANDS))
            return
        command = _BY_NAME.get(arguments[0])
        self._stdout.write(command.usage if command else f"command {arguments[0]} not found\n")

    # -- output

    def _dump(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        for start in range(0, len(data), _DUMP_WIDTH):
            row = bytes(data[start : start + _DUMP_WIDTH])
            digits = "".join(f"{each:02x} " for each in row)
            letters = "".join(chr(each) if each < 0x80 and chr(each).isalnum() else "." for each in row)
            self._stdout.write(f"{offset + start:08x}:  {digits} {letters}\n")

    def _finish(
        self, what: str, options: Mapping[str, str], offset: int, length: int, seconds: float
    ) -> None:
        if "-q" not in options:
            self._report(what, options, offset, length, seconds)

    def _report(
        self, what: str, options: Mapping[str, str], offset: int, length: int, seconds: float
    ) -> None:
        seconds = max(seconds, 1e-9)
        if "-C" in options:
            self._stdout.write(f"{length},1,{_duration(seconds)},{length / seconds:.3f},{1 / seconds:.3f}\n")
            return
        spent = _duration(seconds) if seconds >= 1 else f"{int(seconds * 100) / 100:05.2f} sec"
        self._stdout.write(
            f"{what} {length}/{length} bytes at offset {offset}\n"
            f"{_quantity(length)}, 1 ops; {spent} "
            f"({_quantity(length / seconds)}/sec and {1 / seconds:.4f} ops/sec)\n"
        )


_NOTHING: Final = Permission.nothing()

_COMMANDS: Final = (
    _Command(
        "discard", "d", "[-Cq] off len", "gives a range back", 2, None, Permission.WRITE, QemuIO.discard
    ),
    _Command("flush", "f", "", "brings what was written to the disk", 0, 0, _NOTHING, QemuIO.flush),
    _Command("help", "?", "[command]", "shows one or all commands", 0, 1, _NOTHING, QemuIO.help),
    _Command("length", "l", "", "prints the size", 0, 0, _NOTHING, QemuIO.length),
    _Command(
        "read",
        "r",
        "[-bCpqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a range",
        2,
        None,
        Permission.CONSISTENT_READ,
        QemuIO.read,
    ),
    _Command(
        "readv",
        "rv",
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads the sum of some lengths",
        2,
        None,
        Permission.CONSISTENT_READ,
        QemuIO.readv,
    ),
    _Command(
        "truncate",
        "t",
        "[-m prealloc_mode] off",
        "changes the size",
        1,
        3,
        Permission.WRITE | Permission.RESIZE,
        QemuIO.truncate,
    ),
    _Command(
        "write",
        "w",
        "[-bcCfnpqruz] [-P pattern | -s file] off len",
        "writes a range",
        2,
        None,
        Permission.WRITE,
        QemuIO.write,
    ),
    _Command(
        "writev",
        "wv",
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes the sum of some lengths",
        2,
        None,
        Permission.WRITE,
        QemuIO.writev,
    ),
)

_BY_NAME: Final[Mapping[str, _Command]] = {
    name: command for command in _COMMANDS for name in (command.name, command.abbreviation)
}


# -- reading a line


def _count(command: _Command, given: int) -> str | None:
    """What is wrong with the number of words, or None."""
    if given >= command.fewest and (command.most is None or given <= command.most):
        return None
    if command.most is None:
        wanted = f"at least {command.fewest} arguments"
    elif command.most == command.fewest:
        wanted = f"{command.fewest} arguments"
    else:
        wanted = f"between {command.fewest} and {command.most} arguments"
    return f"bad argument count {given} to {command.name}, expected {wanted}\n"


def _options(arguments: list[str], letters: str) -> tuple[dict[str, str], list[str]]:
    pairs, words = getopt.gnu_getopt(arguments, letters)
    return dict(pairs), words


def _option_complaint(error: getopt.GetoptError) -> str:
    if len(error.opt) > 1:
        # A long option: the program takes its second dash for a letter.
        return "invalid option -- '-'"
    if "requires" in error.msg:
        return f"option requires an argument -- '{error.opt}'"
    return f"invalid option -- '{error.opt}'"


def _number(text: str) -> int:
    """A number of bytes, with a unit perhaps: ``4096``, ``0x1000``, ``4k``, ``1.5M``."""
    refusal = _Refusal(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
    negative, digits = text.startswith("-"), text.lstrip("+-")
    if not digits.isascii():
        raise refusal
    try:
        if digits[:2].lower() == "0x":
            value = int(digits[2:], 16)
        else:
            unit = digits[-1:].upper()
            scale = 1
            if unit in _UNITS and unit:
                scale = 1 << 10 * (_UNITS.index(unit) + 1)
            plain = digits[:-1] if unit == "B" or scale > 1 else digits
            whole, point, fraction = plain.partition(".")
            if not (whole + fraction).isdigit() or (point and scale == 1):
                raise refusal
            value = int(whole or "0") * scale + int(fraction or "0") * scale // 10 ** len(fraction)
    except ValueError:
        raise refusal from None
    if value > _INT64_MAX or (negative and value):
        raise _Refusal(f"Parsing error: argument too large -- {text}")
    return value


def _length(text: str, exception: str = "") -> int:
    value = _number(text)
    if value > _REQUEST_MAX:
        raise _Refusal(f"length cannot exceed {_REQUEST_MAX}{exception}, given {text}")
    return value


def _vector_length(words: list[str]) -> int:
    total = 0
    for word in words:
        value = _number(word)
        if value > _REQUEST_MAX:
            raise _Refusal(f"Argument '{word}' exceeds maximum size {_REQUEST_MAX}")
        total += value
    if total > _REQUEST_MAX:
        raise _Refusal(f"The total number of bytes exceed the maximum size {_REQUEST_MAX}")
    return total


def _pattern(text: str) -> int:
    try:
        value = int(text, 16) if text[:2].lower() == "0x" else int(text, 8 if text[:1] == "0" else 10)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFF:
        raise _Refusal(f"{text} is not a valid pattern byte")
    return value


def _check_sectors(words: list[str]) -> None:
    for what, word in zip(("offset", "count"), words, strict=True):
        if _number(word) % _SECTOR:
            raise _Refusal(f"{_number(word)} is not a sector-aligned value for '{what}'")


# -- what is written


def _fill(pattern: int, length: int) -> _Source:
    """Bytes that are all the same, for a request of `length` bytes."""
    piece = bytes((pattern,)) * min(length, _PIECE)

    async def source(size: int) -> bytes:
        return piece if size == len(piece) else piece[:size]

    return source


class _PatternFile:
    """A file whose contents are written over and over; a long one is read while that goes on.

    :param length: how many bytes will be written.
    :raise _PatternFileFailure: if it can't be read, or there is nothing in it.
    """

    def __init__(self, name: str, length: int) -> None:
        self._name = name
        try:
            # Without waiting for somebody to write into a FIFO.
            self._descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise self._failure(error) from None
        try:
            start = self._next(_PIECE)
            if not start:
                raise _PatternFileFailure(f"{name}: file is empty")
            #: A short file's contents, often enough for a piece from any place on; None for a long file.
            self._pattern: bytes | None = None
            if len(start) < _PIECE:
                self._pattern = start * (2 + min(length, _PIECE) // len(start))
            self._period, self._position = len(start), 0
            if self._pattern is None:
                self._rewind()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    async def read(self, size: int) -> bytes:
        """The next `size` bytes of the endless repetition; at most a piece."""
        if self._pattern is None:
            return await asyncio.to_thread(self._read, size)
        at = self._position % self._period
        self._position += size
        return self._pattern[at : at + size]

    def _read(self, size: int) -> bytes:
        data = self._next(size)
        while len(data) < size:
            self._rewind()
            more = self._next(size - len(data))
            if not more:
                raise _PatternFileFailure(f"{self._name}: file is empty")
            data += more
        return data

    def _next(self, size: int) -> bytes:
        """The next `size` bytes of the file, fewer at its end."""
        data = b""
        try:
            while len(data) < size and (more := os.read(self._descriptor, size - len(data))):
                data += more
        except OSError as error:
            raise self._failure(error) from None
        return data

    def _rewind(self) -> None:
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError | ValueError) -> _PatternFileFailure:
        # ValueError: a name that the system can't be told, with a NUL in it.
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        return _PatternFileFailure(f"{self._name}: {os.strerror(number or 0)}")


# -- requests


def _pieces(offset: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """The pieces of a request: offset and length of each.

    :raise OSError: EIO if any of it is outside the disk, before the first piece.
    """
    if offset + length > size:
        raise OSError(5, os.strerror(5))
    for at in range(offset, offset + length, _PIECE):
        yield at, min(_PIECE, offset + length - at)


def _matches(data: bytes | bytearray | memoryview, at: int, pattern: int, skip: int, length: int) -> bool:
    """Whether `data`, which is `at` bytes after the request's start, has the pattern where it should."""
    first, last = max(skip - at, 0), min(skip + length - at, len(data))
    if first >= last:
        return True
    part = bytes(data[first:last])
    return part.count(pattern) == len(part)


def _quantity(value: float) -> str:
    """A number of bytes for people: ``4 KiB``, ``1.500 KiB``, ``512 bytes``."""
    for exponent in range(len(_UNITS), 0, -1):
        if value >= 1 << 10 * exponent:
            number = f"{value / (1 << 10 * exponent):.3f}".removesuffix(".000")
            return f"{number} {_UNITS[exponent - 1]}iB"
    return f"{value:f}".removesuffix(".000000") + " bytes"


def _duration(seconds: float) -> str:
    """Hours, minutes, seconds and hundredths."""
    hundredths = int(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest // 100:02}.{rest % 100:02}"
