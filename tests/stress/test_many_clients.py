"""Two hundred clients at once: nothing lost, nobody held up, memory flat."""

from __future__ import annotations

import json
import selectors
import time
from collections.abc import Iterator
from typing import Final

from daemons import PATIENCE, Connection, RunningDaemon

CLIENTS: Final = 200
ROUNDS: Final = 10

#: What 200 sessions and their traffic may add to the resident set, in bytes.
ROOM: Final = 64 << 20


def commands_of(client: int) -> Iterator[bytes]:
    """Yield what one client says: its own nodes made, seen and deleted, each command with an id."""
    for turn in range(ROUNDS):
        name = f"node-{client}-{turn}"
        for step, (command, arguments) in enumerate(
            (
                ("blockdev-add", {"driver": "null-co", "node-name": name, "size": 1 << 20}),
                ("blockdev-add", {"driver": "raw", "node-name": f"{name}-raw", "file": name}),
                ("blockdev-del", {"node-name": f"{name}-raw"}),
                ("blockdev-del", {"node-name": name}),
            )
        ):
            request = {"execute": command, "arguments": arguments, "id": [client, turn, step]}
            yield json.dumps(request).encode() + b"\n"


def play_together(clients: list[Connection]) -> list[list[dict[str, object]]]:
    """Let every client say its piece, each waiting for its own reply only; return the replies."""
    replies: list[list[dict[str, object]]] = [[] for _ in clients]
    waiting = [commands_of(number) for number in range(len(clients))]
    with selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            selector.register(client.socket, selectors.EVENT_READ, number)
            client.send(next(waiting[number]))
        while selector.get_map():
            ready = selector.select(PATIENCE)
            assert ready, f"{len(selector.get_map())} clients wait for a reply that does not come"
            for key, _ in ready:
                number = key.data
                replies[number].append(clients[number].receive())
                following = next(waiting[number], None)
                if following is None:
                    selector.unregister(key.fileobj)
                else:
                    clients[number].send(following)
    return replies


def stop_reading(client: Connection) -> int:
    """Send commands without reading until the daemon takes no more; return how many bytes it took."""
    client.socket.setblocking(False)
    request = b'{"execute": "query-commands"}\n' * 100
    sent = 0
    idle_since = time.monotonic()
    while sent < (64 << 20) and time.monotonic() - idle_since < 0.5:
        try:
            sent += client.socket.send(request)
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    return sent


def test_200_clients_are_served_while_one_never_reads(daemon: RunningDaemon) -> None:
    daemon.execute("query-commands")
    before = daemon.resident_memory()
    with daemon.connect() as deaf:
        clients = [daemon.connect() for _ in range(CLIENTS)]
        taken = stop_reading(deaf)
        assert taken < 16 << 20, f"the daemon took {taken} bytes of commands from a client that reads nothing"

        replies = play_together(clients)
        assert replies == [
            [{"return": {}, "id": [number, turn, step]} for turn in range(ROUNDS) for step in range(4)]
            for number in range(CLIENTS)
        ]
        assert daemon.resident_memory() - before < ROOM

        for client in clients:
            client.close()
    assert daemon.node_names() == set()
    daemon.assert_alive()


def test_memory_stays_flat_over_many_rounds(daemon: RunningDaemon) -> None:
    def round_of_clients() -> None:
        clients = [daemon.connect() for _ in range(20)]
        play_together(clients)
        for client in clients:
            client.close()

    round_of_clients()
    before = daemon.resident_memory()
    for _ in range(10):
        round_of_clients()
    assert daemon.resident_memory() - before < 8 << 20
    assert daemon.node_names() == set()


def test_events_reach_every_client_and_a_deaf_one_holds_up_none(daemon: RunningDaemon) -> None:
    """Events pile up for a client that reads nothing: within bounds, and for it alone."""
    deaf = daemon.connect()
    listeners = [daemon.connect() for _ in range(20)]
    daemon.execute("blockdev-add", {"driver": "null-co", "node-name": "disk", "size": 1 << 20})
    before = daemon.resident_memory()
    turns = 200
    for turn in range(turns):
        device = f"disk-{turn}"
        daemon.execute("device_add", {"driver": "virtio-blk-pci", "id": device, "drive": "disk"})
        daemon.execute("device_del", {"id": device})
        for listener in listeners:
            listener.wait_event("DEVICE_DELETED", device=device)
            listener.events.clear()
    assert daemon.resident_memory() - before < ROOM
    for connection in (*listeners, deaf):
        connection.close()
    daemon.assert_alive()
