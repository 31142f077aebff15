from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import socket

import pytest

from qmpd.errors import Error
from qmpd.monitor import peers
from qmpd.monitor.chardev import ChardevConfig, Chardevs
from qmpd.monitor.peers import Credentials, Policy


@pytest.fixture
def pair():
    here, there = socket.socketpair()
    with here, there:
        yield here


@pytest.fixture
def as_if(monkeypatch):
    """Function that makes every peer somebody else."""

    def pretend(user, *groups):
        monkeypatch.setattr(peers, "credentials", lambda connection: Credentials(42, user, frozenset(groups)))

    return pretend


def test_the_kernel_says_who_is_at_the_other_end(pair):
    peer = peers.credentials(pair)
    assert (peer.process, peer.user) == (os.getpid(), os.geteuid())
    assert peer.groups == {os.getegid(), *os.getgroups()}


def test_without_lists_everybody_comes_in(pair, as_if):
    as_if(4711, 4711)
    assert Policy().refusal(pair) is None


@pytest.mark.parametrize(
    ("user", "groups", "admitted"),
    [
        (1001, (5,), True),
        (7, (2002,), True),
        (7, (5, 2002), True),
        (7, (5,), False),
        (2002, (1001,), False),
        (0, (5,), True),
        (os.geteuid(), (5,), True),
    ],
)
def test_users_and_groups_that_are_listed_come_in_and_so_do_root_and_the_daemon_s_own(
    pair, as_if, user, groups, admitted
):
    as_if(user, *groups)
    refusal = Policy(["1001"], ["2002"]).refusal(pair)
    assert (refusal is None) == admitted
    assert admitted or "user 7" in refusal or "user 2002" in refusal


def test_names_are_looked_up(pair, as_if):
    user, group = pwd.getpwall()[-1], grp.getgrall()[-1]
    as_if(user.pw_uid)
    assert Policy([user.pw_name]).refusal(pair) is None
    as_if(4711, group.gr_gid)
    assert Policy([], [group.gr_name]).refusal(pair) is None


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(Error, match="There is no user 'no-such-user'"):
        Policy(["no-such-user"])
    with pytest.raises(Error, match="There is no group 'no-such-group'"):
        Policy([], ["no-such-group"])


async def test_a_refused_client_gets_no_greeting_and_the_log_says_why(tmp_path, as_if, caplog):
    as_if(4711, 4711)
    greeted = []
    chardevs = Chardevs(lambda text: None)
    path = str(tmp_path / "qmp")
    chardev = await chardevs.add(ChardevConfig(id="m", path=path, server=True, wait=False, users=("1001",)))
    await chardev.attach(lambda: greeted.append(1))
    with caplog.at_level(logging.WARNING):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await asyncio.wait_for(reader.read(), 10) == b""
    assert greeted == []
    assert "process 42 of user 4711" in caplog.text
    writer.close()
    await chardevs.close()
