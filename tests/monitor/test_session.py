"""Negotiation, requests' shape, out-of-band rules: the order and words of qemu-storage-daemon 10.0.2."""

from __future__ import annotations

import json

import pytest

from qmpd.errors import CommandNotFound, Error
from qmpd.monitor.session import Session

EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"
COMPLETE = "Capabilities negotiation is already complete, command ignored"
NO_OOB = "QMP input member 'exec-oob' is unexpected"


@pytest.fixture
def session(dispatcher, command):
    oob = command(allow_oob=True)
    handlers = {"query": None, "urgent": None}
    return Session(dispatcher(handlers, urgent=oob).schema, {"qemu": {}, "package": "p"})


def refusal(session, text):
    (message,) = session.receive(text.encode())
    with pytest.raises(Error) as caught:
        session.admit(message)
    return caught.value


def test_the_greeting_offers_oob(session):
    assert session.greeting() == {
        "QMP": {"version": {"qemu": {}, "package": "p"}, "capabilities": ["oob"]},
    }


@pytest.mark.parametrize("name", ["query", "no-such-command", ""])
def test_before_the_negotiation_every_other_command_is_refused_in_the_same_words(session, name):
    error = refusal(session, json.dumps({"execute": name}))
    assert isinstance(error, CommandNotFound)
    assert error.desc == EXPECTING
    assert not session.wants_events


def test_after_the_negotiation_commands_are_admitted_and_a_second_negotiation_is_not(session):
    session.negotiate()
    assert session.wants_events
    (message,) = session.receive(b'{"execute": "query", "arguments": {"value": 1}}')
    call = session.admit(message)
    assert (call.name, call.arguments) == ("query", {"value": 1})
    assert call.command is session._commands["query"]
    (message,) = session.receive(b'{"execute": "qmp_capabilities", "arguments": {"bogus": 1}}')
    # Admitted, because its arguments are looked at first.
    assert session.admit(message).name == "qmp_capabilities"
    with pytest.raises(CommandNotFound) as caught:
        session.negotiate()
    assert caught.value.desc == COMPLETE


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("[]", "QMP input must be a JSON object"),
        ("1 ", "QMP input must be a JSON object"),
        ("null ", "QMP input must be a JSON object"),
        ("@", "JSON parse error, stray '@'"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"arguments": {}}', "QMP input lacks member 'execute'"),
        ('{"arguments": 1}', "QMP input member 'arguments' must be an object"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": null}', "QMP input member 'execute' must be a string"),
        ('{"arguments": 1, "execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "query", "arguments": null}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "no", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "query", "argument": {}}', "QMP input member 'argument' is unexpected"),
        ('{"exec-oob": "query"}', NO_OOB),
        ('{"exec-oob": 1}', NO_OOB),
        ('{"execute": "query", "exec-oob": "query"}', NO_OOB),
        ('{"execute": ""}', "The command  has not been found"),
        ('{"execute": "qu%s\\u0000"}', "The command qu%s\0 has not been found"),
    ],
)
def test_what_is_no_request_is_refused_in_qemu_s_words(session, text, desc):
    session.negotiate()
    assert refusal(session, text).desc == desc


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ('{"exec-oob": "query"}', "The command query does not support OOB"),
        ('{"exec-oob": "qmp_capabilities"}', "The command qmp_capabilities does not support OOB"),
        ('{"exec-oob": "no"}', "The command no has not been found"),
        ('{"exec-oob": 7}', "QMP input member 'exec-oob' must be a string"),
        ('{"exec-oob": 7, "execute": 7}', "QMP input member 'exec-oob' must be a string"),
        ('{"exec-oob": "a", "execute": 7, "arguments": 7}', "QMP input member 'execute' must be a string"),
        (
            '{"exec-oob": "a", "execute": "a", "arguments": 7}',
            "QMP input member 'execute' clashes with 'exec-oob'",
        ),
    ],
)
def test_with_oob_enabled_only_commands_that_allow_it_are_executed_out_of_band(session, text, desc):
    session.negotiate(["oob"])
    assert refusal(session, text).desc == desc
    (message,) = session.receive(b'{"exec-oob": "urgent"}')
    assert session.goes_first(message)
    assert session.admit(message).name == "urgent"


def test_without_the_capability_nothing_goes_first(session):
    session.negotiate()
    (message,) = session.receive(b'{"exec-oob": "urgent"}')
    assert not session.goes_first(message)


def test_a_capability_that_was_not_offered_can_t_be_enabled(session):
    with pytest.raises(Error, match="Capability late not available"):
        session.negotiate(["oob", "late"])
    assert not session.oob
    assert not session.wants_events
