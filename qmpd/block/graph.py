"""The block graph: adding and deleting nodes, attaching users, keeping the permissions.

A change is made in three steps: build what is new beside the graph, check the
permissions of everything below it, and only then let others see it.  On the
way out of a failure the steps are undone in reverse order, so a refused
command leaves nothing behind.

Opening a node may take time (an unlock runs in a thread), and other clients
go on meanwhile.  Therefore a node under construction already holds its name
and its children, but is not *ready*: nobody can list, find or use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterable, Iterator, Mapping, Set
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from qmpd.block import backing
from qmpd.block.backend import Backend
from qmpd.block.change import Change
from qmpd.block.cipher_pool import CipherPool
from qmpd.block.derivation_memory import DerivationMemory
from qmpd.block.derivation_speed import DerivationSpeed
from qmpd.block.edge import Edge, Parent
from qmpd.block.file_locks import PassedLocks
from qmpd.block.node import MAX_SIZE, Node
from qmpd.block.options import NodeOptions
from qmpd.block.permissions import Permission, names, on_backing
from qmpd.block.threads import Threads
from qmpd.block.throttle_groups import ThrottleGroups
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.crypto.steps import Steps
from qmpd.descriptors import FdSets
from qmpd.errors import Error

T = TypeVar("T")

#: A node name has at most this many characters.
NODE_NAME_MAX = 31

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

#: Threads that wait for storage; keys are derived in threads of their own, so that
#: a few slow unlocks do not hold up reads and writes.
IO_THREADS = 8
KEY_THREADS = 2


#: What stands before a complaint about the image behind, once for each image on the way there.
_BACKING_FAILED = "Could not open backing file: "


@contextlib.contextmanager
def _backing_failures() -> Iterator[None]:
    try:
        yield
    except Error as error:
        raise Error(_BACKING_FAILED + error.desc, error.hint) from None


class _Section:
    """A drained section: the nodes that it is about, and the backends that it has stopped."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = tuple(nodes)
        self.backends: list[Backend] = []
        #: What the backends' requests go through.
        self._hurried: list[Node] = []

    def stop_users(self) -> None:
        """Stop the backends above that are not stopped yet."""
        for backend in _users(self._nodes):
            if backend not in self.backends:
                backend.begin_drained()
                self.backends.append(backend)
                # Who is being attached just now has nothing under way.
                for node in _parents_first(backend.edge.child) if backend.edge is not None else ():
                    node.begin_hurry()
                    self._hurried.append(node)

    def end(self) -> None:
        """Let them all go on."""
        for backend in self.backends:
            backend.end_drained()
        for node in self._hurried:
            node.end_hurry()


#: Is told of a damaged image: the node; what is wrong; where it is in the file and how long, in
#: bytes, -1 where that says nothing; whether the image can't be used any more.
Corrupted = Callable[[Node, str, int, int, bool], None]

#: Is told of a write beyond a node's threshold: the node; the threshold; where the write ends, in bytes.
Exceeded = Callable[[Node, int, int], None]


class Graph:
    """All nodes of a daemon and their users.

    :param drivers: the driver classes by their QAPI names.
    :param secrets: gives a copy of the passphrase of a secret's id at the moment of
        use, for the user to wipe; raises Error if there is none.
    :param key_memory: where the volume keys are; by default in pages of its own.
    :param cipher_pool: other processes that cipher long requests; by default this one does it all.
    :param pbkdf_memory: what key derivations may take together, in KiB; None for what is usual.
    :param validate: checks BlockdevOptions that stand in an image's header, and returns them with
        numbers where there were strings for numbers; raises Error.
    :param corrupted: is told when a driver finds that an image is damaged.
    :param exceeded: is told of writes beyond a node's threshold.
    :param fdsets: the descriptors that file names like `/dev/fdset/0` stand for.
    :param old_encryption: qcow2 images with the AES encryption that was before LUKS are opened, which
        QEMU's emulators refuse.
    :param throttle_groups: what limits nodes and disks.
    """

    def __init__(
        self,
        drivers: Mapping[str, type[Node]],
        *,
        secrets: Callable[[str], KeyBuffer],
        key_memory: KeyMemory | None = None,
        cipher_pool: CipherPool | None = None,
        pbkdf_memory: int | None = None,
        validate: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        corrupted: Corrupted | None = None,
        exceeded: Exceeded | None = None,
        fdsets: FdSets | None = None,
        old_encryption: bool = True,
        throttle_groups: ThrottleGroups | None = None,
    ) -> None:
        self._corrupted = corrupted
        self._exceeded = exceeded
        self.fdsets = fdsets or FdSets()
        self.old_encryption = old_encryption
        self.throttle_groups = throttle_groups or ThrottleGroups()
        self.passed_locks = PassedLocks()
        self._drivers = drivers
        self._validate = validate
        self._known_drivers: dict[str, type[Node]] = {}
        self.secrets = secrets
        self.key_memory = key_memory or KeyMemory()
        self.cipher_pool = cipher_pool
        #: Every node by its name, the ones under construction included, oldest first.
        self._nodes: dict[str, Node] = {}
        self.backends: list[Backend] = []
        self._generated = 0
        self._sections: list[_Section] = []
        self._changing = asyncio.Lock()
        #: Gone as soon as nobody has them or waits for them.
        self._turns: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self.derivation_memory = DerivationMemory(pbkdf_memory)
        self.derivation_speed = DerivationSpeed()
        self._departing: set[asyncio.Task[None]] = set()
        self._io_threads = Threads(IO_THREADS, "qmpd-io")
        self._key_threads = Threads(KEY_THREADS, "qmpd-key")

    # -- looking

    def nodes(self) -> list[Node]:
        """The nodes that clients can see, newest first."""
        return [node for node in reversed(self._nodes.values()) if node.ready]

    def find(self, name: str) -> Node | None:
        """The node with this name, or None."""
        node = self._nodes.get(name)
        return node if node is not None and node.ready else None

    def disks(self) -> list[Backend]:
        """The disks of devices, oldest first."""
        return [backend for backend in self.backends if backend.qdev is not None]

    def subtree(self, root: Node) -> list[Node]:
        """`root` and all nodes below it, each before those that it uses."""
        return _parents_first(root)

    def lookup(self, device: str | None, node_name: str | None) -> Node:
        """The node that a command means by its members `device` or `node-name`.

        :raise Error: if neither names one.
        """
        if device:
            for backend in self.backends:
                if backend.name == device:
                    return backend.node
        node = self.find(node_name) if node_name else None
        if node is None:
            raise Error(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
        return node

    def reference(self, name: str) -> Node:
        """The node that a reference in another node's options means.

        :raise Error: if there is none.
        """
        return self.lookup(name, name)

    def report_corruption(self, node: Node, message: str, offset: int, size: int, fatal: bool) -> None:
        """A driver has found that its image is damaged; see `Corrupted`."""
        if self._corrupted is not None:
            self._corrupted(node, message, offset, size, fatal)

    def report_threshold(self, node: Node, threshold: int, end: int) -> None:
        """Somebody writes beyond a node's threshold; see `Exceeded`."""
        if self._exceeded is not None:
            self._exceeded(node, threshold, end)

    # -- adding

    async def add(self, options: Mapping[str, Any]) -> Node:
        """Open a node as `blockdev-add` does.

        :param options: BlockdevOptions, validated, in QAPI's names.
        :raise Error: if it can't be opened; then nothing has changed.
        """
        if "node-name" not in options:
            raise Error("'node-name' must be specified for the root node")
        node = await self._open(options, None)
        node.monitor_owned = True
        return node

    async def open_without_backing(self, options: Mapping[str, Any]) -> Node:
        """Open a node that nobody owns yet, and not the images behind it.

        :param options: BlockdevOptions in QAPI's names, not validated.
        :raise Error: if it can't be opened; then nothing has changed.
        """
        checked = self._validate({**options})
        node = await self._open_image(checked, None)
        self._show(node)
        return node

    @contextlib.asynccontextmanager
    async def borrow(self, reference: str | Mapping[str, Any]) -> Any:
        """A node for the time of an ``async with``: an existing one, or one defined inline.

        :raise Error: if it is not there or can't be opened.
        """
        if isinstance(reference, str):
            yield self.reference(reference)
            return
        node = await self._open(reference, None)
        try:
            yield node
        finally:
            await self._release(node)

    async def open_child(self, parent: Node, role: str, reference: str | Mapping[str, Any]) -> Node:
        """Attach the node that `reference` names or defines below `parent`.

        :raise Error: if that can't be; then nothing has changed.
        """
        child = await self._resolve_child(parent, role, reference)
        await self._adopt(parent, role, child, inline=not isinstance(reference, str))
        return child

    async def _resolve_child(self, parent: Node, role: str, reference: str | Mapping[str, Any]) -> Node:
        # What is defined inside the same parent is not ready yet, but can be referred to.
        own = _below(parent).get(reference) if isinstance(reference, str) else None
        if reference == parent.name:
            return parent
        return own or await self._resolve(reference, parent.node_options.for_child(role))

    async def _adopt(self, parent: Node, role: str, child: Node, *, inline: bool) -> None:
        """Attach `child` below `parent`; if that can't be, close it unless it is somebody's.

        :param inline: the child was made along with its parent, and inherits from it.
        """
        if child is parent:
            raise Error(f"Making '{parent.name}' a {role} child of '{parent.name}' would create a cycle")
        try:
            self._link(parent, role, child)
        except BaseException:
            await self._release(child)
            raise
        if inline:
            child.inherits_from = parent

    async def _resolve(self, reference: str | Mapping[str, Any], options: NodeOptions) -> Node:
        if isinstance(reference, str):
            return self.reference(reference)
        return await self._open(reference, options)

    async def _open(self, options: Mapping[str, Any], inherited: NodeOptions | None) -> Node:
        """Open a node with all that is below it, its backing images included."""
        node = await self._open_image(options, inherited)
        try:
            await self._open_chain(node)
        except BaseException:
            await self._dispose(node)
            raise
        if inherited is None:
            self._show(node)
        return node

    async def _open_image(self, options: Mapping[str, Any], inherited: NodeOptions | None) -> Node:
        """Open a node without its backing image."""
        driver = await self._driver(options["driver"])
        common = NodeOptions.parse(options, inherited)
        file = None if driver.is_protocol else await self._resolve(options["file"], common)
        try:
            common.check()
            node = driver(self, self._new_name(options.get("node-name")), options, common)
        except BaseException:
            if file is not None:
                await self._release(file)
            raise
        self._nodes[node.name] = node
        try:
            if file is not None:
                await self._adopt(node, "file", file, inline=not isinstance(options["file"], str))
            await node.open()
            if node.size > MAX_SIZE:
                raise Error(f"Could not refresh total sector count: {os.strerror(errno.EFBIG)}")
        except BaseException:
            await self._dispose(node)
            raise
        return node

    # -- backing images

    async def _open_chain(self, node: Node) -> None:
        """Open the images behind `node`, one after the other: a chain may be long.

        :raise Error: what is wrong with one of them; some may be open then.
        """
        overlay: Node | None = node
        seen: set[Hashable] = set()
        followed: list[Node] = []
        while overlay is not None and overlay.supports_backing:
            seen.add(overlay.identity)
            if len(seen) > backing.LONGEST_CHAIN + 1:
                raise Error(f"More than {backing.LONGEST_CHAIN} images are behind this one")
            try:
                overlay = await self._open_backing(overlay, seen)
            except Error as error:
                raise Error(_BACKING_FAILED * (len(seen) - 1) + error.desc, error.hint) from None
            if overlay is not None:
                followed.append(overlay)
        # An image's name depends on whether the one behind it is the one that it names itself.
        for child in reversed(followed):
            parent = child.parents[0].parent
            assert isinstance(parent, Node), "an image that was just opened has one user"
            parent.implied_backing = child.filename

    async def _open_backing(self, overlay: Node, seen: Set[Hashable]) -> Node | None:
        """Open one backing image.

        :param seen: the identities of the images that must not be met again.
        :returns: the node, if its own backing image is still to be opened.
        """
        if "backing" in overlay.options:
            reference = overlay.options["backing"]
            if not reference:
                # The empty string is an old way to write null.
                return None
            with _backing_failures():
                child = await self._resolve_child(overlay, "backing", reference)
            await self._adopt(overlay, "backing", child, inline=not isinstance(reference, str))
            return None
        with _backing_failures():
            name = overlay.full_backing_filename
            if name is None:
                return None
            inherited = overlay.node_options.for_child("backing")
            child = await self._open_named(name, overlay.backing_format, inherited)
        await self._adopt(overlay, "backing", child, inline=True)
        if child.identity in seen:
            raise Error(f"Backing file '{name}' creates an infinite loop.")
        return child

    async def _open_named(self, name: str, image_format: str | None, inherited: NodeOptions) -> Node:
        """Open the image with this full name, without the one that is behind it in turn.

        :param image_format: its driver; None to find out.
        """
        options = backing.options_for(name, image_format)
        driver = options.get("driver")
        if driver is not None and driver not in self._drivers:
            raise Error(f"Unknown driver '{driver}'")
        if driver is not None and "file" in options and (await self._driver(driver)).is_protocol:
            options = {**options.pop("file"), **options}
        if driver is None:
            options["driver"] = "raw"
        # What is in a header comes from whoever wrote it: it is checked as if a client had sent it.
        options = backing.validated(options, self._validate)
        if driver is None:
            options["driver"] = await self._probe(options["file"], inherited)
        return await self._open_image(options, inherited)

    async def _probe(self, reference: str | Mapping[str, Any], inherited: NodeOptions) -> str:
        """The driver for an image of unknown format."""
        node = await self._resolve(reference, inherited)
        try:
            beginning = await node.pread(0, min(backing.PROBE_BYTES, node.size))
        except OSError as error:
            raise Error(f"Could not read image for determining its format: {error.strerror}") from None
        finally:
            await self._release(node)
        driver = backing.probe(bytes(beginning))
        if driver not in self._drivers:
            raise Error(f"Unknown driver '{driver}'")
        return driver

    async def _driver(self, name: str) -> type[Node]:
        """The class of a driver; looking one up for the first time imports it, which takes a while."""
        driver = self._known_drivers.get(name)
        if driver is None:
            driver = await self.in_io_thread(self._drivers.__getitem__, name)
            self._known_drivers[name] = driver
        return driver

    def _show(self, node: Node) -> None:
        node.ready = True
        for edge in node.children.values():
            if not edge.child.ready:
                self._show(edge.child)

    def _new_name(self, wanted: str | None) -> str:
        """A name for a new node: the wanted one if it may be had, else a generated one."""
        if wanted is None:
            # QEMU's form: a counter and two random digits, so that nobody relies on it.
            name = f"#block{self._generated}{random.randrange(100):02}"
            self._generated += 1
            return name
        if not _WELL_FORMED.fullmatch(wanted):
            raise Error(f"Invalid node-name: '{wanted}'")
        if any(backend.name == wanted for backend in self.backends):
            raise Error(f"node-name={wanted} is conflicting with a device id")
        if wanted in self._nodes:
            raise Error(f"Duplicate nodes with node-name='{wanted}'")
        if len(wanted) > NODE_NAME_MAX:
            raise Error("Node name too long")
        return wanted

    # -- deleting

    async def delete(self, name: str) -> None:
        """Close a node that the monitor added, as `blockdev-del` does.

        :raise Error: if it is not there, not the monitor's, or in use.
        """
        async with self._changing:
            await self._delete(name)

    async def _delete(self, name: str) -> None:
        node = self.find(name)
        if node is None:
            raise Error(f"Failed to find node with node-name='{name}'")
        if any(isinstance(edge.parent, Backend) and not edge.parent.is_jobs for edge in node.parents):
            raise Error(f"Node {name} is in use")
        check_unused_as_backing(node)
        if not node.monitor_owned:
            raise Error(f"Node {name} is not owned by the monitor")
        if node.parents or node.jobs:
            raise Error(f"Block device {name} is in use")
        # Nobody is above, so nothing is under way; and nobody comes before it is gone.
        async with self.drained(node):
            node.monitor_owned = False
            await self._dispose(node)

    async def _release(self, node: Node) -> None:
        """Close `node` if nobody uses or owns it (any more)."""
        if not node.parents and not node.monitor_owned:
            await self._dispose(node)

    async def _dispose(self, node: Node) -> None:
        if node.closing:
            return
        node.ready, node.closing = False, True
        with contextlib.suppress(OSError):
            # Nobody is left who could be told that it failed.
            await node.settle()
        children = [edge.child for edge in node.children.values()]
        for edge in list(node.children.values()):
            self._unlink(edge)
        try:
            await node.close()
        finally:
            if self._nodes.get(node.name) is node:
                del self._nodes[node.name]
            for child in children:
                await self._release(child)

    async def close(self) -> None:
        """Detach all users, close all nodes, end the threads."""
        for backend in list(self.backends):
            backend.detach()
        await self.departed()
        while self._nodes:
            for node in list(reversed(self._nodes.values())):
                if not node.parents and node.name in self._nodes:
                    await self._dispose(node)
        if self.cipher_pool is not None:
            await self.cipher_pool.close()
        for threads in (self._io_threads, self._key_threads):
            threads.close()

    # -- draining

    @contextlib.asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """A section in which no request is under way in these nodes.

        Every backend above any of them, however far, is stopped: what it has begun is finished
        before the body runs, and what comes meanwhile waits in the order in which it came until
        the section has ended.  A backend that is attached above during the section is stopped as
        well.  Sections may overlap and be nested: a backend goes on when the last one has ended.
        They do not exclude each other.

        The body makes its own requests through the nodes; those through a backend would wait for ever.
        """
        section = _Section(nodes)
        self._sections.append(section)
        try:
            section.stop_users()
            # More may be added to the end of the list on the way.
            for backend in section.backends:
                await backend.idle()
            yield
        finally:
            self._sections.remove(section)
            section.end()

    # -- edges and permissions

    def attach(self, parent: Parent, role: str, node: Node, perm: Permission, shared: Permission) -> Edge:
        """A new edge to `node` from `parent`.

        :raise Error: on a conflict of permissions; then nothing has changed.
        """
        edge = Edge(parent, role, node, perm, shared)
        node.parents.insert(0, edge)
        try:
            self._refresh(node)
        except BaseException:
            node.parents.remove(edge)
            raise
        for section in self._sections:
            section.stop_users()
        return edge

    def detach(self, edge: Edge) -> None:
        """Remove a backend's edge, and give back what it took.

        A node that was only this backend's, as an overlay that nobody has added may be, closes; see
        :meth:`departed`.
        """
        node = edge.child
        node.parents.remove(edge)
        self._refresh(node)
        if node.ready and not node.parents and not node.monitor_owned:
            node.ready = False
            departing = asyncio.get_running_loop().create_task(self._release(node))
            self._departing.add(departing)
            departing.add_done_callback(self._departing.discard)

    async def departed(self) -> None:
        """Return when all nodes are closed that have lost their last user."""
        while self._departing:
            await asyncio.wait(self._departing)

    def change_permissions(self, edge: Edge, perm: Permission, shared: Permission) -> None:
        """Take and share something else along `edge`.

        :raise Error: on a conflict; then all is as before.
        """
        before = edge.perm, edge.shared
        edge.perm, edge.shared = perm, shared
        try:
            self._refresh(edge.child)
        except BaseException:
            edge.perm, edge.shared = before
            raise

    def _link(self, parent: Node, role: str, child: Node) -> None:
        perm, shared = _on_child(parent, role, child, Permission.nothing(), Permission.everything())
        edge = self.attach(parent, role, child, perm, shared)
        parent.children[role] = edge

    def _unlink(self, edge: Edge) -> None:
        assert isinstance(edge.parent, Node)
        del edge.parent.children[edge.name]
        edge.child.parents.remove(edge)
        if edge.perm or edge.shared != Permission.everything():
            self._refresh(edge.child)

    # -- changes of what is there

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[Change]:
        """A change of several steps: all of them are made, or none.  There is one at a time."""
        async with self._changing, Change() as change:
            yield change

    @contextlib.asynccontextmanager
    async def turn(self, what: Hashable) -> AsyncIterator[None]:
        """For the time of an ``async with`` nobody else is in one for an equal `what`; they wait in order."""
        turn = self._turns.setdefault(what, asyncio.Lock())
        async with turn:
            yield

    def has_turn(self, what: Hashable) -> bool:
        """Whether somebody is in a `turn` for this."""
        turn = self._turns.get(what)
        return turn is not None and turn.locked()

    def swap_child(self, parent: Node, role: str, child: Node | None, change: Change) -> None:
        """Put `child` (or nothing) below `parent` in place of what is there in this role.

        The permissions are not looked at before :meth:`settle` is called.

        :raise Error: if that would make a cycle.
        """
        if child is not None and parent in _parents_first(child):
            raise Error(f"Making '{child.name}' a {role} child of '{parent.name}' would create a cycle")
        change.on_failure(_put_back, parent.children, dict(parent.children))
        before = parent.children.get(role)
        if before is not None:
            _take_edge(before, change)
            del parent.children[role]
            change.on_success(self._release, before.child)
        if child is not None:
            edge = Edge(parent, role, child, Permission.nothing(), Permission.everything())
            _put_edge(edge, change)
            parent.children[role] = edge

    def replace(self, old: Node, new: Node, change: Change) -> None:
        """Let all users of `old` use `new`, except those below `new`, which need `old` themselves.

        The permissions are not looked at before :meth:`settle` is called.
        """
        below = _parents_first(new)
        for edge in reversed([edge for edge in old.parents if edge.parent not in below]):
            _take_edge(edge, change)
            change.on_failure(setattr, edge, "child", old)
            edge.child = new
            _put_edge(edge, change)
            if isinstance(edge.parent, Node):
                # It is its parent's newest child now.
                children = edge.parent.children
                change.on_failure(_put_back, children, dict(children))
                children[edge.name] = children.pop(edge.name)

    def settle(self, *nodes: Node, frozen: Collection[Node] = ()) -> None:
        """Give all nodes from these on down the permissions that the graph as it is asks for.

        :param frozen: those that have just become read-only.
        :raise Error: on a conflict; then the permissions are those from before.
        """
        self._refresh(*nodes, frozen=frozen)

    async def release(self, node: Node) -> None:
        """Close `node` if nobody uses or owns it (any more)."""
        await self._release(node)

    def _refresh(self, *roots: Node, frozen: Collection[Node] = ()) -> None:
        """Work out the permissions of `roots` and all below them, check them, then set them.

        Parents come before their children, so that a node which is reached in
        two ways is looked at once, when all that is asked of it is known.
        """
        proposed: dict[Edge, tuple[Permission, Permission]] = {}
        prepared: list[Node] = []
        try:
            for node in _parents_first(*roots):
                asked = [(edge, *proposed.get(edge, (edge.perm, edge.shared))) for edge in node.parents]
                perm, shared = Permission.nothing(), Permission.everything()
                for _, edge_perm, edge_shared in asked:
                    perm |= edge_perm
                    shared &= edge_shared
                if perm & ~shared:
                    _check_conflicts(node, asked)
                if node.read_only and perm & (Permission.WRITE | Permission.WRITE_UNCHANGED):
                    if node in frozen:
                        raise Error(f"Read-only block node '{node.name}' cannot support read-write users")
                    raise Error("Block node is read-only")
                prepared.append(node)
                node.prepare_permissions(perm, shared)
                for edge in node.children.values():
                    proposed[edge] = _on_child(node, edge.name, edge.child, perm, shared)
        except BaseException:
            for node in reversed(prepared):
                node.abort_permissions()
            raise
        for edge, (perm, shared) in proposed.items():
            edge.perm, edge.shared = perm, shared
        for node in prepared:
            node.commit_permissions()

    # -- threads

    async def in_io_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that may wait for storage in a thread.

        A thread can't be interrupted.  If the task is cancelled, the function has nevertheless
        ended, or is never begun, when this returns: what it uses may be closed then.
        """
        return await self._io_threads.run_to_the_end(function, *arguments)

    async def in_key_thread(self, steps: Steps[T]) -> T:
        """Take the steps of a key derivation or another long computation in threads.

        All computations take turns.  If the task is cancelled, the step that was begun is the last one,
        and it has ended when this returns: what the steps use may be wiped then.
        """
        return await self._key_threads.run_steps(steps)

    def give_up_keys(self) -> None:
        """From now on whoever is cancelled does not wait for a step: the process is about to end."""
        self._key_threads.abandon()


def _on_child(
    parent: Node, role: str, child: Node, perm: Permission, shared: Permission
) -> tuple[Permission, Permission]:
    """What `parent` takes and shares on `child`; with `force-share` it shares everything."""
    if role == "backing":
        perm, shared = on_backing(perm, shared)
    else:
        perm, shared = parent.child_permissions(role, perm, shared)
    return perm, Permission.everything() if child.node_options.force_share else shared


def check_unused_as_backing(node: Node) -> None:
    """Refuse what may not be done to an image that is another one's backing image.

    :raise Error: it names the other one.
    """
    for edge in node.parents:
        if edge.name == "backing" and isinstance(edge.parent, Node):
            raise Error(f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'")


def _users(nodes: Iterable[Node]) -> Iterable[Backend]:
    """The backends above these nodes, each once."""
    found: dict[int, Backend] = {}
    seen: set[int] = set()
    above = list(nodes)
    while above:
        node = above.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for edge in node.parents:
            if isinstance(edge.parent, Node):
                above.append(edge.parent)
            elif isinstance(edge.parent, Backend):
                found[id(edge.parent)] = edge.parent
    return found.values()


def _put_back(children: dict[str, Edge], before: Mapping[str, Edge]) -> None:
    children.clear()
    children.update(before)


def _take_edge(edge: Edge, change: Change) -> None:
    """Take an edge out of its child's list."""
    place = edge.child.parents.index(edge)
    edge.child.parents.remove(edge)
    change.on_failure(edge.child.parents.insert, place, edge)


def _put_edge(edge: Edge, change: Change) -> None:
    """Put an edge at the head of its child's list."""
    edge.child.parents.insert(0, edge)
    change.on_failure(edge.child.parents.remove, edge)


def _below(node: Node) -> dict[str, Node]:
    """The nodes below `node` by their names."""
    found: dict[str, Node] = {}
    for edge in node.children.values():
        found |= {edge.child.name: edge.child, **_below(edge.child)}
    return found


def _parents_first(*roots: Node) -> list[Node]:
    """`roots` and all nodes below them, each before those that it uses."""
    order: list[Node] = []
    seen: set[int] = set()

    def visit(node: Node) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for edge in node.children.values():
            visit(edge.child)
        order.append(node)

    for root in roots:
        visit(root)
    order.reverse()
    return order


def _check_conflicts(node: Node, asked: Iterable[tuple[Edge, Permission, Permission]]) -> None:
    """Refuse if one edge takes what another one does not share.

    :raise Error: it names both.
    """
    edges = list(asked)
    for mine, _, shared in edges:
        for other, perm, _ in edges:
            conflict = perm & ~shared
            if other is not mine and conflict:
                raise Error(
                    f"Permission conflict on node '{node.name}': permissions '{names(conflict)}' are both "
                    f"required by {other.describe()} and unshared by {mine.describe()}."
                )
