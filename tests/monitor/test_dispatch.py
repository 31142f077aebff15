from __future__ import annotations

import asyncio
import logging

import pytest

from qmpd.errors import DeviceNotFound, Error
from qmpd.monitor.dispatch import Unfinished
from qmpd.monitor.session import Session

SECRET = "correct horse battery"


def negotiated(dispatcher):
    session = Session(dispatcher.schema, {})
    session.negotiate()
    return session


def begin(dispatcher, name, **members):
    return dispatcher.begin(negotiated(dispatcher), {"execute": name, **members})


def test_a_plain_function_is_answered_at_once(dispatcher):
    reply = begin(
        dispatcher({"double": lambda arguments: arguments["value"] * 2}),
        "double",
        arguments={"value": 2},
        id=7,
    )
    assert reply.message == {"return": 4, "id": 7}


async def test_a_coroutine_has_not_begun_until_it_is_awaited_in_a_task(dispatcher):
    tasks = []

    async def handler(arguments):
        async with asyncio.timeout(10):
            tasks.append(asyncio.current_task())
            await asyncio.sleep(0)
        return {}

    commands = dispatcher({"wait": handler})
    unfinished = begin(commands, "wait", id=None)
    assert isinstance(unfinished, Unfinished)
    assert tasks == []
    reply = await asyncio.create_task(commands.finish(unfinished))
    assert reply.message == {"return": {}, "id": None}
    assert tasks[0] is not None


async def test_a_refusal_is_told_with_its_class_and_text(dispatcher):
    def plain(arguments):
        raise DeviceNotFound("no such thing")

    async def waiting(arguments):
        raise Error("not now")

    commands = dispatcher({"plain": plain, "waiting": waiting})
    assert begin(commands, "plain", id=1).message == {
        "id": 1,
        "error": {"class": "DeviceNotFound", "desc": "no such thing"},
    }
    reply = await commands.finish(begin(commands, "waiting"))
    assert reply.message == {"error": {"class": "GenericError", "desc": "not now"}}


def test_arguments_are_validated_before_the_handler_is_called(dispatcher):
    called = []
    reply = begin(dispatcher({"query": called.append}), "query", arguments={"bogus": 1})
    assert reply.message["error"]["desc"] == "Parameter 'bogus' is unexpected"
    assert called == []


async def test_an_unexpected_exception_is_logged_and_answered_without_quoting_a_secret(dispatcher, caplog):
    def plain(arguments):
        try:
            raise KeyError(arguments["value"])
        except KeyError as error:
            raise ValueError(f"bad value {arguments['value']}") from error

    async def waiting(arguments):
        plain(arguments)

    commands = dispatcher({"plain": plain, "waiting": waiting})
    with caplog.at_level(logging.ERROR):
        first = begin(commands, "plain", arguments={"value": SECRET})
        second = await commands.finish(begin(commands, "waiting", arguments={"value": SECRET}))
    for reply, name in ((first, "plain"), (second, "waiting")):
        assert reply.message["error"]["class"] == "GenericError"
        assert name in reply.message["error"]["desc"]
        assert "ValueError" in reply.message["error"]["desc"]
        assert SECRET not in str(reply.message)
    assert caplog.text.count("Traceback") == 2
    assert "KeyError" in caplog.text
    assert "test_dispatch.py" in caplog.text
    assert SECRET not in caplog.text


def test_success_of_a_command_without_a_success_response_is_not_answered(dispatcher, command):
    commands = dispatcher({"silent": lambda arguments: {}}, silent=command(success_response=False))
    assert begin(commands, "silent") is None
    assert "error" in begin(commands, "silent", arguments={"x": 1}).message


def test_doubles_are_looked_for_only_where_there_can_be_any(dispatcher, command):
    handlers = {"number": lambda arguments: 0.5, "none": lambda arguments: {}}
    commands = dispatcher(handlers, number=command(returns_number=True))
    assert begin(commands, "number").may_have_doubles
    assert begin(commands, "none", id=[0.5]).may_have_doubles
    assert not begin(commands, "none", id="x").may_have_doubles


def test_negotiation_is_the_session_s(dispatcher):
    commands = dispatcher({})
    session = Session(commands.schema, {})
    reply = commands.begin(
        session, {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "hello"}
    )
    assert reply.message == {"return": {}, "id": "hello"}
    assert session.oob


def test_every_command_must_have_a_handler_and_every_handler_a_command(dispatcher, command):
    with pytest.raises(ValueError, match="without a handler: .'forgotten'"):
        dispatcher({}, forgotten=command())
