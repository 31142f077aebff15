"""The client that loads a monitor: a process of its own, and as little work as possible.

Commands are encoded before the clock starts, replies are counted by their line
ends and searched for one word.  Run as a program with the socket's path; every
line on standard input asks for one run, and is answered by one line:

    {"template": "...", "first": 0, "count": 1000, "pipelined": false}
    {"seconds": 0.123}

In the template ``@`` stands for the number of the command.  With "lasting" in
place of the numbers, one command is sent again and again for so many seconds, with a
pause after each reply, and the answer has what every single round trip took, in
seconds.  Without a pause the moments in which the daemon has nothing else to do
would have most of the samples:

    {"template": "...", "lasting": 2.0, "pause": 0.001}
    {"latencies": [0.0002, 0.0003]}
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time


class Load:
    """A negotiated connection to the monitor at *path*."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.receive()
        self.socket.sendall(b'{"execute": "qmp_capabilities"}\n')
        # qemu-storage-daemon greets a client twice that connects while it is still starting.
        while b'"return"' not in self.receive():
            pass

    def receive(self) -> bytes:
        """Return what came, up to a line end."""
        data = self.socket.recv(65536)
        while not data.endswith(b"\n"):
            more = self.socket.recv(65536)
            if not more:
                raise EOFError("the daemon closed the connection")
            data += more
        return data

    def closed_loop(self, commands: list[bytes]) -> float:
        """Send each command when the reply to the one before is there; return seconds."""
        send, receive = self.socket.sendall, self.socket.recv
        start = time.perf_counter()
        for command in commands:
            send(command)
            reply = receive(65536)
            if not reply.endswith(b"\n"):
                reply += self.receive()
            if b'"error"' in reply:
                raise RuntimeError(f"{command!r}: {reply!r}")
        return time.perf_counter() - start

    def latencies(self, command: bytes, lasting: float, pause: float) -> list[float]:
        """Send *command*, wait for the reply and *pause*, for *lasting* seconds; return what each took."""
        taken = []
        end = time.perf_counter() + lasting
        while time.perf_counter() < end:
            taken.append(self.closed_loop([command]))
            time.sleep(pause)
        return taken

    def pipelined(self, commands: list[bytes]) -> float:
        """Send as fast as the daemon takes it while counting replies; return seconds."""
        unsent = memoryview(b"".join(commands))
        expected = len(commands)
        self.socket.setblocking(False)
        start = time.perf_counter()
        while expected > 0:
            readable, writable, _ = select.select([self.socket], [self.socket] if unsent else [], [])
            if writable:
                unsent = unsent[self.socket.send(unsent[:65536]) :]
            if readable:
                replies = self.socket.recv(1 << 18)
                if not replies or b'"error"' in replies:
                    raise RuntimeError(f"an error reply, or none: {replies[:300]!r}")
                expected -= replies.count(b"\n")
        seconds = time.perf_counter() - start
        self.socket.setblocking(True)
        return seconds


def main() -> None:
    """Answer requests from standard input until it ends."""
    load = Load(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        if "lasting" in request:
            command = request["template"].encode() + b"\n"
            taken = load.latencies(command, request["lasting"], request["pause"])
            print(json.dumps({"latencies": taken}), flush=True)
            continue
        numbers = range(request["first"], request["first"] + request["count"])
        commands = [request["template"].replace("@", str(number)).encode() + b"\n" for number in numbers]
        seconds = load.pipelined(commands) if request["pipelined"] else load.closed_loop(commands)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
