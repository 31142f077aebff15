"""Wrong command lines, given to qemu-storage-daemon and to qmpd: status and words are the same."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemons import PATIENCE, STORAGE_DAEMON
from preloaded import Preloaded

#: Each ends both programs before they run.
WRONG = [
    ["--object"],
    ["--obj", "secret,id=a", "--block", "driver=nope"],
    ["--object", "secret"],
    ["--object", "nope,id=a"],
    ["--object", ""],
    ["--object="],
    ["--object", "qom-type=secret,id=a,data=x", "--object", "qom-type=secret,id=a,data=x"],
    ["--object", "secret,id=a,data=x,foo=y"],
    ["--object", "secret,id=_-3,data=x"],
    ["--object", "secret,,id=a"],
    ["--object", "secret,id=a,,data=x"],
    ["--object", "secret,id=a,data"],
    ["--object", "secret,id=a,iv.x=3,data=1"],
    ["--object", "secret,id=a,format=foo,data=1"],
    ["--object", "secret,id=a,.x=1"],
    ["--object", "secret,id=a,x y=1"],
    ["--object", "help,secret"],
    ["--object", "iothread,id=a,poll-max-ns=1k"],
    ["--object", "iothread,id=a,poll-max-ns=99999999999999999999"],
    ["--object", '{"qom-type":"secret"'],
    ["--object", '{"qom-type":"secret"}'],
    ["--object", "[1]"],
    ["--blockdev", '{"driver":"null-co", bad}'],
    ["--blockdev", '{"driver":"null-co"}'],
    ["--blockdev", '{"driver":"raw"} x'],
    ["--blockdev", '{"driver":"raw"}{}'],
    ["--blockdev", ' {"driver":"raw"}'],
    ["--blockdev", '{"driver":"null-co","driver":"null-co"}'],
    ["--blockdev", "{'driver':'null-co'}"],
    ["--blockdev", "driver=null-co"],
    ["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
    ["--blockdev", ""],
    ["--blockdev", "=x"],
    ["--blockdev", "foo"],
    ["--blockdev", "help"],
    ["--blockdev", "null-co,?"],
    ["--blockdev", "driver=file,node-name=a,filename"],
    ["--blockdev", "null-co,node-name=a,size=1k"],
    ["--blockdev", "null-co,node-name=a,read-only=maybe"],
    ["--blockdev", "null-co,node-name=a,cache=foo"],
    ["--blockdev", "null-co,node-name=a,cache.direct=on,cache=foo"],
    ["--blockdev", "raw,node-name=a,file.0=x"],
    ["--blockdev", "raw,node-name=a,file=x"],
    ["--blockdev", "raw,node-name=a,file.driver=null-co,file=x"],
    ["--monitor", "m"],
    ["--monitor", "help"],
    ["--monitor", ""],
    ["--monitor", "mode=control"],
    ["--monitor", "chardev=m,mode=readline"],
    ["--monitor", "chardev=m,mode=foo"],
    ["--monitor", "chardev=m,foo=1"],
    ["--monitor", "chardev=m,pretty"],
    ["--monitor", "chardev=m,pretty=maybe"],
    ["--monitor", '{"chardev":"a","pretty":"on"}'],
    ["--chardev", "stdio,id=a", "--monitor", "a,mode=readline"],
    ["--chardev", ""],
    ["--chardev="],
    ["--chardev", "id=a"],
    ["--chardev", "socket"],
    ["--chardev", "socket,id=a"],
    ["--chardev", "nope,id=a"],
    ["--chardev", "socket,id=a,path=s,server=maybe"],
    ["--chardev", "socket,id=a,path=s,foo=1"],
    ["--chardev", "socket,id=a,path=s,wait=off"],
    ["--chardev", "socket,id=a,path=s"],
    ["--chardev", "socket,id=a,host=localhost"],
    ["--chardev", "socket,id=a,host=localhost,port=abc,server=on,wait=off"],
    ["--chardev", "socket,id=a,host=127.0.0.1,port=1"],
    ["--chardev", "socket,id=a,path=s,host=x,port=3,server=on,wait=off"],
    ["--chardev", "socket,id=a,fd=99,server=on,wait=off"],
    ["--chardev", "socket,id=a,fd=0,server=on,wait=off"],
    ["--chardev", "socket,id=a,fd=abc,server=on,wait=off"],
    ["--chardev", "socket,id=a,path=none/s,server=on,wait=off"],
    ["--chardev", f"socket,id=a,path={'x' * 200},server=on,wait=off"],
    ["--chardev", "socket,id=3a,path=s,server=on,wait=off"],
    ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
    ["--chardev", "stdio,id=a,foo=off"],
    ["--daemonize", "--chardev", "stdio,id=a"],
    ["--daemonize", "--object", "secret"],
    ["--daemonize", "--pidfile", "none/pid"],
    ["--pidfile", "none/pid"],
    ["--pidfile", "/"],
    ["--pidfile", ""],
    ["--pidfile"],
    ["--pidfile", "none/pid", "--object", "secret"],
    ["foo"],
    ["-"],
    [""],
    ["--pidfile", "pid", "foo"],
    ["-x"],
    ["-xV"],
    ["-T"],
    ["--trace", "foo=bar"],
    ["--frobnicate"],
    ["--frob=3"],
    ["---"],
    ["--version=1"],
    ["--daemonize=1"],
    ["--ch", "--help"],
    ["--frob", "--version"],
    ["--blockdev", "null-co,node-name=n", "--export", "type=nbd,id=e,node-name=n"],
    ["--export", "nbd,id=e,node-name=n"],
    *(
        ["--nbd-server", value]
        for value in (
            "",
            "help",
            "foo",
            "addr.type=unix",
            "addr.type=tcp",
            "addr.type=unix,addr.path=no/s",
            "addr.type=unix,addr.path=s,tls-creds=x",
            "addr.type=unix,addr.path=s,max-connections=x",
            "addr.type=unix,addr.path=s,max-connections=-1",
            "addr.type=unix,addr.path=s,handshake-max-seconds=-1",
            "addr.type=unix,addr.path=s,foo=1",
            '{"addr":{"type":"unix","data":{"path":"s"}}}',
            '{"addr":{"type":"unix","path":1}}',
            '{"addr":{"type":"unix","path":"s"}} x',
            "addr.type=inet,addr.host=127.0.0.1",
            "addr.type=inet,addr.host=127.0.0.1,addr.port=abc",
            "addr.type=fd,addr.str=99",
            "addr.type=fd,addr.str=0",
            "addr.type=fd,addr.str=abc",
            "addr.type=fd,addr.str=",
            "addr.type=fd,addr.str=-1",
            "addr.type=fd,addr.str=0x5",
            "addr.type=fd,addr.str=9999999999",
            "addr.type=vsock,addr.cid=1,addr.port=x",
            "addr.type=inet,addr.host=127.0.0.1,addr.port=0,addr.ipv4=off,addr.ipv6=off",
        )
    ),
    ["--nbd-server", "addr.type=unix,addr.path=s", "--nbd-server", "addr.type=unix,addr.path=t"],
    ["--object", "secret,id=x,data=y", "--nbd-server", "addr.type=unix,addr.path=s,tls-creds=x"],
    *(
        ["--blockdev", "null-co,node-name=n", "--nbd-server", "addr.type=unix,addr.path=s", *exports]
        for exports in (
            ["--export", "help"],
            ["--export", ""],
            ["--export", "nbd"],
            ["--export", "nbd,id=e"],
            ["--export", "foo,id=e,node-name=n"],
            ["--export", "nbd,id=e,node-name=x"],
            ["--export", "nbd,id=3,node-name=n"],
            ["--export", "nbd,id=e,node-name=n,writable=maybe"],
            ["--export", "nbd,id=e,node-name=n,bitmaps.0=x"],
            ["--export", "nbd,id=e,node-name=n,iothread=x"],
            ["--export", "nbd,id=e,node-name=n,foo=x"],
            ["--export", '{"type":"nbd","id":"e","node-name":"n","name":3}'],
            ["--export", "nbd,id=e,node-name=n", "--export", "nbd,id=e,node-name=n"],
            ["--export", "nbd,id=e,node-name=n", "--export", "nbd,id=f,node-name=n"],
        )
    ),
    *(
        ["--object", value]
        for value in (
            "tls-creds-x509,id=t",
            "tls-creds-x509,id=t,endpoint=server",
            "tls-creds-x509,id=t,dir=.,endpoint=server",
            "tls-creds-x509,id=t,dir=none,endpoint=client",
            "tls-creds-x509,id=t,dir=.,endpoint=foo",
            "tls-creds-psk,id=t",
            "tls-creds-psk,id=t,dir=.,endpoint=server",
            "authz-simple,id=a",
            "authz-list,id=a,policy=foo",
            "authz-list,id=a,rules.0.match=x",
            "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.format=regex",
        )
    ),
]


Refusal = tuple[int, str]


def refusal(ended: subprocess.CompletedProcess[str]) -> Refusal:
    """Return the exit status and the first line on standard error, without the program's name.

    A second line is a hint, which qmpd does without or puts into the first.
    """
    first, *_ = ended.stderr.splitlines()
    return ended.returncode, first.partition(": ")[2]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[Refusal, Refusal]]:
    """What qemu-storage-daemon and qmpd say to each of them, asked several at a time."""
    root = tmp_path_factory.mktemp("refusals")

    def ask(index: int) -> tuple[Refusal, Refusal]:
        directories = theirs, ours = root / f"{index}-theirs", root / f"{index}-ours"
        for directory in directories:
            directory.mkdir()
        peer = subprocess.run(
            [*STORAGE_DAEMON, *WRONG[index]],
            cwd=theirs,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return refusal(peer), refusal(qmpd.run(*WRONG[index], directory=ours))

    with Preloaded() as qmpd, ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(map(tuple, WRONG), pool.map(ask, range(len(WRONG))), strict=True))


# The first one waits for some 300 processes.
@pytest.mark.timeout(600)
@pytest.mark.peer("qemu-storage-daemon")
@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_line_is_refused_alike(
    arguments: list[str], refusals: dict[tuple[str, ...], tuple[Refusal, Refusal]]
) -> None:
    (status, expected), (own_status, own) = refusals[tuple(arguments)]
    assert own_status == status
    # On purpose: what comes after a passphrase's beginning is not repeated.
    assert own.startswith(re.sub(r"(--object .*?\bdata=).*?(?=: )", r"\1...", expected))
