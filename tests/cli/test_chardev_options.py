"""What --chardev and --qmp describe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.cli.chardev_options import chardev_config, monitor_shortcut
from qmpd.errors import Error
from qmpd.monitor.chardev import ChardevConfig
from qmpd.qapi.settings import HelpRequested, Kind, parse_settings

KNOWN = {
    "path": Kind.TEXT,
    "server": Kind.SWITCH,
    "nodelay": Kind.SWITCH,
    "wait": Kind.SWITCH,
    "reconnect": Kind.NUMBER,
}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("server", {"server": True}),
        ("noserver", {"server": False}),
        ("nowait", {"wait": False}),
        ("nodelay", {"nodelay": True}),
        ("server=on,wait=off", {"server": True, "wait": False}),
        ("server=yes,wait=no", {"server": True, "wait": False}),
        ("server=true,wait=false", {"server": True, "wait": False}),
        ("server=y,wait=n", {"server": True, "wait": False}),
        ("server=off,server=on", {"server": True}),
        ("path=a,,b", {"path": "a,b"}),
        ("path=a=b", {"path": "a=b"}),
        ("path=", {"path": ""}),
        ("path", {"path": "on"}),
        ("nopath", {"path": "off"}),
        ("path=a,", {"path": "a"}),
        ("reconnect=16", {"reconnect": 16}),
        ("reconnect=0x10", {"reconnect": 16}),
        ("reconnect=020", {"reconnect": 16}),
        ("id=a,id=b", {"id": "a"}),
    ],
)
def test_the_dialect_is_read_as_qemu_reads_it(text: str, settings: dict[str, object]) -> None:
    assert parse_settings(text, KNOWN) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo=1", "Invalid parameter 'foo'"),
        ("foo", "Invalid parameter 'foo'"),
        ("nofoo", "Invalid parameter 'foo'"),
        ("nowait=on", "Invalid parameter 'nowait'"),
        ("=on", "Invalid parameter ''"),
        ("server=maybe", "Parameter 'server' expects 'on' or 'off'"),
        ("reconnect=abc", "Parameter 'reconnect' expects a number"),
        ("reconnect=1.5", "Parameter 'reconnect' expects a number"),
        ("reconnect", "Parameter 'reconnect' expects a number"),
        ("id=3a", "Parameter 'id' expects an identifier"),
        ("id=", "Parameter 'id' expects an identifier"),
        ("id=a,,path=s", "Parameter 'id' expects an identifier"),
        ("foo=1,id=3a", "Parameter 'id' expects an identifier"),
    ],
)
def test_a_wrong_setting_is_refused_in_qemus_words(text: str, message: str) -> None:
    with pytest.raises(Error) as refusal:
        parse_settings(text, KNOWN)
    assert refusal.value.desc == message


@pytest.mark.parametrize("text", ["help", "?", "id=a,help", "help,id=a", "socket,help"])
def test_help_may_be_asked_for_anywhere(text: str) -> None:
    with pytest.raises(HelpRequested):
        parse_settings(text, {**KNOWN, "backend": Kind.TEXT}, "backend")


@given(st.dictionaries(st.sampled_from(["path", "host", "port"]), st.text(min_size=1), max_size=3))
def test_any_value_survives_when_its_commas_are_doubled(settings: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in settings.items())
    assert parse_settings(text, None) == settings


@pytest.mark.parametrize(
    ("text", "config"),
    [
        (
            "socket,id=m,path=/run/q.sock,server=on,wait=off",
            ChardevConfig(id="m", kind="socket", path="/run/q.sock", server=True, wait=False),
        ),
        (
            "socket,id=m,path=a,,b,server,nowait",
            ChardevConfig(id="m", kind="socket", path="a,b", server=True, wait=False),
        ),
        (
            "socket,id=m,path=s,server=on",
            ChardevConfig(id="m", kind="socket", path="s", server=True, wait=True),
        ),
        ("socket,id=m,path=s", ChardevConfig(id="m", kind="socket", path="s", server=False, wait=False)),
        (
            "backend=socket,id=m,path=s",
            ChardevConfig(id="m", kind="socket", path="s", server=False, wait=False),
        ),
        (
            "socket,id=m,path=s,server=on,wait=off,abstract=on",
            ChardevConfig(id="m", kind="socket", path="\0s", server=True, wait=False),
        ),
        (
            "socket,id=m,path=s,server=on,wait=off,abstract=on,tight=off",
            ChardevConfig(id="m", kind="socket", path="\0s" + "\0" * 106, server=True, wait=False),
        ),
        (
            "socket,id=m,host=::1,port=4444,server=on,wait=off",
            ChardevConfig(id="m", kind="socket", host="::1", port="4444", server=True, wait=False),
        ),
        (
            "socket,id=m,fd=7,server=on,wait=off",
            ChardevConfig(id="m", kind="socket", fd=7, server=True, wait=False),
        ),
        (
            "socket,id=m,path=s,server=on,wait=off,mode=0660,group=disk,users=root:1000,groups=kvm",
            ChardevConfig(
                id="m",
                kind="socket",
                path="s",
                server=True,
                wait=False,
                mode=0o660,
                group="disk",
                users=("root", "1000"),
                groups=("kvm",),
            ),
        ),
        ("stdio,id=m,signal=off", ChardevConfig(id="m", kind="stdio")),
        # What belongs to another kind is ignored, as QEMU does.
        ("stdio,id=m,path=x,server=on", ChardevConfig(id="m", kind="stdio")),
        ("socket,id=m,fd=7,cols=80,telnet=off", ChardevConfig(id="m", kind="socket", fd=7, wait=False)),
    ],
)
def test_a_character_device_is_described(text: str, config: ChardevConfig) -> None:
    assert chardev_config(text) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "chardev: no id specified"),
        ("socket", "chardev: no id specified"),
        ('{"backend":"x"}', "chardev: no id specified"),
        ("id=a", 'chardev: "a" missing backend'),
        ("nope,id=a", "'nope' is not a valid char driver name"),
        ("socket,id=a", "Unable to parse FD number "),
        ("socket,id=a,fd=abc", "Unable to parse FD number abc"),
        ("socket,id=a,fd=0x3", "Unable to parse FD number 0x3"),
        ("socket,id=a,host=localhost", "chardev: socket: no port given"),
        ("socket,id=a,path=s,wait=off", "'wait' option is incompatible with socket in client connect mode"),
        (
            "socket,id=a,path=s,host=x,port=3,server=on,wait=off",
            "None or one of 'path', 'fd' or 'host' option required.",
        ),
        ("socket,id=a,path=s,telnet=on", "Parameter 'telnet' is not supported by qmpd"),
        ("socket,id=a,path=s,tls-creds=t", "Parameter 'tls-creds' is not supported by qmpd"),
        (
            "socket,id=a,path=s,mode=rw",
            "Parameter 'mode' expects octal digits such as 0660, not 'rw'",
        ),
        (
            "socket,id=a,path=s,users=root::1",
            "Parameter 'users' expects names or numbers separated by colons",
        ),
    ],
)
def test_a_wrong_character_device_is_refused(text: str, message: str) -> None:
    with pytest.raises(Error) as refusal:
        chardev_config(text)
    assert refusal.value.desc == message


@pytest.mark.parametrize(
    ("text", "config"),
    [
        (
            "unix:/run/q.sock,server=on,wait=off",
            ChardevConfig(id="compat_monitor0", kind="socket", path="/run/q.sock", server=True, wait=False),
        ),
        (
            "unix:a,,b,server,nowait",
            ChardevConfig(id="compat_monitor0", kind="socket", path="a,b", server=True, wait=False),
        ),
        (
            "tcp:localhost:4444,server=on,wait=off",
            ChardevConfig(
                id="compat_monitor0", kind="socket", host="localhost", port="4444", server=True, wait=False
            ),
        ),
        (
            "tcp::4444,server=on,wait=off",
            ChardevConfig(id="compat_monitor0", kind="socket", host="", port="4444", server=True, wait=False),
        ),
        (
            "tcp:[::1]:4444,server=on,wait=off",
            ChardevConfig(
                id="compat_monitor0", kind="socket", host="::1", port="4444", server=True, wait=False
            ),
        ),
        ("stdio", ChardevConfig(id="compat_monitor0", kind="stdio")),
        ("mon:stdio", ChardevConfig(id="compat_monitor0", kind="stdio")),
    ],
)
def test_a_monitor_in_one_option_is_described(text: str, config: ChardevConfig) -> None:
    assert monitor_shortcut(text, 0) == config


def test_monitors_in_one_option_are_numbered() -> None:
    assert monitor_shortcut("stdio", 3).id == "compat_monitor3"


@pytest.mark.parametrize("text", ["", "foo", "foo:bar", "tcp:foo", "unixx:/s", "stdios"])
def test_what_is_no_monitor_is_refused(text: str) -> None:
    with pytest.raises(Error, match="is not a valid char driver: unix:PATH, tcp:HOST:PORT or stdio"):
        monitor_shortcut(text, 0)


def test_an_unknown_setting_of_a_monitor_is_refused() -> None:
    with pytest.raises(Error) as refusal:
        monitor_shortcut("unix:s,foo=1", 0)
    assert refusal.value.desc == "Invalid parameter 'foo'"
