from __future__ import annotations

import asyncio
import json
import logging
import os
import socket

import pytest


def lines(*names, **members):
    return b"".join(json.dumps({"execute": name, **members}).encode() + b"\n" for name in names)


async def test_a_client_is_greeted_and_gets_its_own_session(serve):
    served = await serve({"query": lambda arguments: 1})
    first = await served.connect()
    second = await served.connect(negotiate=False)
    assert (await second.receive())["QMP"]["capabilities"] == ["oob"]
    assert (await first.ask("query")) == {"return": 1}
    assert (await second.ask("query"))["error"]["class"] == "CommandNotFound"


async def test_pipelined_commands_are_answered_in_order_whether_they_wait_or_not(serve):
    async def wait(arguments):
        await asyncio.sleep(0.001)
        return "waited"

    served = await serve({"wait": wait, "query": lambda arguments: "at once"})
    client = await served.connect()
    for number in range(50):
        client.send(lines("query" if number % 3 else "wait", id=number))
    replies = [await client.receive() for _ in range(50)]
    assert [reply["id"] for reply in replies] == list(range(50))
    assert {reply["return"] for reply in replies} == {"waited", "at once"}


async def test_a_command_that_waits_holds_up_its_own_session_only(serve):
    gate = asyncio.Event()

    async def wait(arguments):
        await gate.wait()
        return "waited"

    served = await serve({"wait": wait, "query": lambda arguments: 1})
    slow, other = await served.connect(), await served.connect()
    slow.send(lines("wait", "query"))
    for _ in range(10):
        assert await other.ask("query") == {"return": 1}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(slow.reader.readexactly(1), 0.05)
    gate.set()
    assert [await slow.receive(), await slow.receive()] == [{"return": "waited"}, {"return": 1}]


async def test_an_out_of_band_command_goes_round_the_queue(serve, command):
    gate = asyncio.Event()

    async def wait(arguments):
        await gate.wait()
        return "waited"

    async def release(arguments):
        gate.set()
        return "released"

    served = await serve(
        {"wait": wait, "query": lambda arguments: 1, "release": release}, release=command(allow_oob=True)
    )
    client = await served.connect("oob")
    client.send(lines("wait", "query") + b'{"exec-oob": "release", "id": 1}')
    replies = [await client.receive() for _ in range(3)]
    assert replies == [{"return": "released", "id": 1}, {"return": "waited"}, {"return": 1}]


async def test_a_client_with_a_full_queue_is_not_read_from(serve):
    gate = asyncio.Event()

    async def wait(arguments):
        await gate.wait()
        return {}

    served = await serve({"wait": wait})
    client = await served.connect()
    written = 0
    # Far more than the queue, one read of the socket and the kernel's buffers could take.
    for _ in range(1000):
        client.send(lines("wait") * 1000)
        written += 1000
        await asyncio.sleep(0)
        if client.writer.transport.get_write_buffer_size() > 4 << 20:
            break
    else:
        pytest.fail("the monitor took in everything")
    gate.set()
    for _ in range(written):
        assert await client.receive() == {"return": {}}


async def test_a_client_that_does_not_read_is_not_executed_for(serve):
    executed = []

    def big(arguments):
        executed.append(1)
        return "x" * 100_000

    served = await serve({"big": big, "query": lambda arguments: 1})
    deaf, other = await served.connect(), await served.connect()
    deaf.reader._transport.pause_reading()
    deaf.send(lines("big") * 1000)
    for _ in range(100):
        assert await other.ask("query") == {"return": 1}
    await asyncio.sleep(0.05)
    assert 1 <= len(executed) < 100
    deaf.reader._transport.resume_reading()
    for _ in range(1000):
        assert len((await deaf.receive())["return"]) == 100_000
    assert len(executed) == 1000


async def test_a_client_for_which_too_many_events_pile_up_is_disconnected(serve, caplog):
    served = await serve({"query": lambda arguments: 1}, options={"output_limit": 1 << 20})
    deaf, other = await served.connect(), await served.connect()
    deaf.reader._transport.pause_reading()
    listening = asyncio.create_task(_count_events(other, 400))
    with caplog.at_level(logging.WARNING):
        for _ in range(400):
            served.monitor.emit("BLOCK_JOB_READY", {"device": "x" * 10_000})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    assert await listening == 400
    assert "does not read" in caplog.text
    assert await other.ask("query") == {"return": 1}
    assert len(served.monitor._connections) == 1


async def _count_events(client, number):
    for _ in range(number):
        assert (await client.receive())["event"] == "BLOCK_JOB_READY"
    return number


async def test_events_go_to_every_negotiated_client_and_precede_the_reply_of_their_cause(serve):
    def act(arguments):
        served.monitor.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "created"})
        return {}

    async def wait(arguments):
        await asyncio.sleep(0)
        return act(arguments)

    served = await serve({"act": act, "wait": wait})
    acting, listening = await served.connect(), await served.connect()
    fresh = await served.connect(negotiate=False)
    await fresh.receive()
    acting.send(lines("act", "wait", "act", id=1))
    for _ in range(3):
        event = await acting.receive()
        assert list(event) == ["timestamp", "event", "data"]
        assert event["data"] == {"id": "j", "status": "created"}
        assert await acting.receive() == {"return": {}, "id": 1}
        assert (await listening.receive())["event"] == "JOB_STATUS_CHANGE"
    assert await fresh.ask("qmp_capabilities") == {"return": {}}


class Recorder(asyncio.Transport):
    """A client that takes whatever it is told."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, data):
        self.writes.append(data)

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def is_closing(self):
        return False


async def test_replies_to_pipelined_commands_go_out_together(serve, monkeypatch):
    monkeypatch.setattr("qmpd.monitor.server._TURN", 1000.0)
    served = await serve({"query": lambda arguments: {}})
    connection = served.monitor.connection()
    transport = Recorder()
    connection.connection_made(transport)
    connection.data_received(lines("qmp_capabilities", *["query"] * 100))
    assert len(transport.writes) == 2
    assert transport.writes[1].count(b"\r\n") == 101
    connection.connection_lost(None)


async def test_a_client_that_vanishes_does_not_stop_its_command(serve):
    gate, done = asyncio.Event(), asyncio.Event()

    async def wait(arguments):
        await gate.wait()
        done.set()
        return {}

    served = await serve({"wait": wait, "query": lambda arguments: 1})
    client, other = await served.connect(), await served.connect()
    client.send(lines("wait", "wait"))
    await asyncio.sleep(0.02)
    client.writer.transport.abort()
    await asyncio.sleep(0.02)
    gate.set()
    await asyncio.wait_for(done.wait(), 10)
    assert await other.ask("query") == {"return": 1}


class Vain:
    """A handler that waits until it is told to go on or is cancelled."""

    def __init__(self):
        self.begun, self.gate, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, arguments):
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return {}


@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_command_that_nobody_wants_any_more_is_cancelled(serve, half_closed):
    vain = Vain()
    served = await serve({"vain": vain, "query": lambda arguments: 1})
    client, other = await served.connect(), await served.connect()
    client.send(lines("vain"))
    await asyncio.wait_for(vain.begun.wait(), 10)
    if half_closed:
        client.writer.write_eof()
        await asyncio.sleep(0.02)
    client.writer.transport.abort()
    await asyncio.wait_for(vain.cancelled.wait(), 10)
    assert await other.ask("query") == {"return": 1}


async def test_a_client_that_only_stops_talking_still_wants_its_command(serve, monkeypatch):
    monkeypatch.setattr("qmpd.monitor.server._GRACE", 0)
    vain = Vain()
    served = await serve({"vain": vain})
    client = await served.connect()
    client.send(lines("vain"))
    client.writer.write_eof()
    await asyncio.wait_for(vain.begun.wait(), 10)
    await asyncio.sleep(0.05)
    vain.gate.set()
    assert [await client.receive() for _ in range(2)] == [{"return": {}}, None]
    assert not vain.cancelled.is_set()


async def test_what_a_client_said_before_it_went_is_done_if_it_is_quick(serve):
    done = asyncio.Event()

    async def vain(arguments):
        await asyncio.sleep(0)
        done.set()
        return {}

    served = await serve({"vain": vain})
    client = await served.connect()
    client.send(lines("vain"))
    client.writer.close()
    await asyncio.wait_for(done.wait(), 10)


async def test_a_watch_for_clients_that_went_leaves_no_descriptor_behind(serve):
    vain = Vain()
    served = await serve({"vain": vain})

    async def visit():
        client = await served.connect()
        client.send(lines("vain"))
        await asyncio.wait_for(vain.begun.wait(), 10)
        client.writer.write_eof()
        await asyncio.sleep(0.01)
        client.writer.transport.abort()
        await asyncio.wait_for(vain.cancelled.wait(), 10)
        vain.begun.clear()
        vain.cancelled.clear()
        while served.monitor._connections:
            await asyncio.sleep(0.01)

    await visit()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await visit()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_client_that_has_said_all_gets_its_answers_before_the_end(serve):
    async def wait(arguments):
        await asyncio.sleep(0.01)
        return {}

    served = await serve({"wait": wait, "query": lambda arguments: 1})
    client = await served.connect()
    client.send(lines("wait", "query", "wait"))
    client.writer.write_eof()
    assert [await client.receive() for _ in range(4)] == [{"return": {}}, {"return": 1}, {"return": {}}, None]


async def test_after_quit_nothing_is_executed_and_the_reply_is_sent_before_the_end(serve):
    closing = []

    def quit(arguments):
        served.monitor.stop()
        closing.append(asyncio.get_running_loop().create_task(served.monitor.close()))
        return {}

    executed = []
    served = await serve({"quit": quit, "query": executed.append})
    client = await served.connect()
    client.send(lines("quit", "query"))
    assert await client.receive() == {"return": {}}
    assert await client.receive() is None
    await closing[0]
    assert executed == []


async def test_closing_does_not_wait_for_ever_for_a_client_that_does_not_read(serve, monkeypatch):
    monkeypatch.setattr("qmpd.monitor.server._FAREWELL", 0.05)
    served = await serve({"big": lambda arguments: "x" * 8_000_000})
    deaf = await served.connect()
    deaf.reader._transport.pause_reading()
    deaf.send(lines("big"))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(served.monitor.close(), 10)
    await asyncio.sleep(0)
    assert not served.monitor._connections


async def test_a_turn_ends_so_that_others_get_theirs(serve, monkeypatch):
    seconds = 0
    order = []

    def note(arguments):
        nonlocal seconds
        seconds += 1
        order.append(arguments["value"])

    monkeypatch.setattr("qmpd.monitor.server.perf_counter", lambda: seconds)
    monkeypatch.setattr("qmpd.monitor.server._TURN", 5)
    served = await serve({"note": note})
    connections = [served.monitor.connection() for _ in range(2)]
    for value, connection in enumerate(connections):
        connection.connection_made(Recorder())
        connection.data_received(lines("qmp_capabilities"))
        connection.data_received(lines(*["note"] * 70, arguments={"value": value}))
    while len(order) < 140:
        await asyncio.sleep(0)
    for connection in connections:
        connection.connection_lost(None)
    # The clock runs from the end of a turn's first command on.
    assert order == ([0] * 7 + [1] * 7) * 10


async def test_pretty_mode_reaches_the_wire(serve):
    served = await serve({"query": lambda arguments: {}}, options={"pretty": True})
    client = await served.connect(negotiate=False)
    greeting = await client.reader.readuntil(b"\r\n}\r\n")
    assert greeting.startswith(b'{\r\n    "QMP": {\r\n        "version": {\r\n')


async def test_two_hundred_clients_work_while_one_never_reads(serve):
    async def wait(arguments):
        await asyncio.sleep(0)
        served.monitor.emit("NEWS", {"of": arguments["value"]})
        return arguments["value"]

    served = await serve({"wait": wait}, options={"output_limit": 1 << 20})
    dead = socket.socket(socket.AF_UNIX)
    dead.setblocking(False)
    await asyncio.get_running_loop().sock_connect(dead, served.path)
    requests = lines("qmp_capabilities") + lines("wait", arguments={"value": -1}) * 100
    await asyncio.get_running_loop().sock_sendall(dead, requests)

    async def converse(number):
        client = await served.connect()
        client.send(lines(*["wait"] * 5, arguments={"value": number}))
        replies, events = 0, []
        while replies < 5:
            message = await client.receive()
            if "event" in message:
                events.append(message["data"]["of"])
            else:
                assert message == {"return": number}
                replies += 1
        # Each reply comes after its own event, and every event comes at most once.
        assert events.count(number) == 5

    await asyncio.gather(*(converse(number) for number in range(200)))
    dead.close()
    for connection in served.monitor._connections:
        assert connection._output_size < 2 << 20
