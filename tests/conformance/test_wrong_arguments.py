"""Whatever is wrong with a command's arguments, qmpd and QEMU refuse it in the same words.

The conversation is made of the schema: for every command, with every branch of its unions, each member is
missing, of a wrong type or an unknown value, and one more is there that nobody knows.  One thing is wrong at
a time, so that there is one answer.  A seed chooses the wrong values.  Besides, each command is sent before
the negotiation, out of band, and under ids of all kinds.  ``qmpdiff`` plays it to one process each.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import pytest
from daemons import CHECKOUT
from harness import load_qmpdiff

from qmpd.qapi import load

qmpdiff = load_qmpdiff()

#: Seconds for one step of a daemon.
PATIENCE: Final = 20

#: What is ours alone, or differs on purpose; an answer to ``query-qmp-schema`` is long, and after ``quit``
#: nobody answers.  Where the model of a processor is looked up, QEMU does that before it looks at 'props'.
LEFT_OUT_COMMANDS: Final = frozenset(
    {"blockdev-amend", "x-blockdev-amend", "query-qmp-schema", "query-cpu-model-expansion", "quit"}
)
OUR_BRANCHES: Final = frozenset({"gluks"})
OUR_MEMBERS: Final = frozenset({"header-file"})
OUR_FEATURE: Final = "__org.qmpd_extension"

#: What QEMU does not do without where qmpd does: a new image's size, beside what only new images have.
NEEDED_TOGETHER: Final = {"preallocation": ("size", 1)}

WRONG: Final = (None, True, 1, -1, 1.5, 1 << 70, "x", "", [], {}, [1])

#: By JSON type: is a value of it?
OF_TYPE: Final = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value < 1 << 63,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "value": lambda value: True,
}

GOOD: Final = {"string": "nope", "int": 1, "number": 1, "boolean": True, "null": None, "value": "v"}

IDS: Final = (None, True, 1, -1.5, "x", "", [1, {"a": None}], {"a": []})

#: How deep a thing inside others is spoilt.
DEPTH: Final = 3

#: Commands whose arguments are as wide as all drivers together.
SHALLOW: Final = frozenset({"blockdev-add"})

Info = Mapping[str, Any]


@dataclass(frozen=True)
class Mistakes:
    """Makes wrong values of the types of a schema.

    :param types: ``query-qmp-schema``, by name.
    :param values: how many wrong values there are for one that is not an object.
    """

    types: Mapping[str, Info]
    source: Random
    values: int = 2

    def branches(self, info: Info) -> list[Info]:
        return [each for each in info.get("variants", ()) if each["case"] not in OUR_BRANCHES]

    def members(self, info: Info, branch: str | None) -> list[Info]:
        """Return the members of an object, with those of a branch."""
        found = list(info["members"])
        for each in self.branches(info):
            if each["case"] == branch:
                inner = self.types[each["type"]]
                found += self.members(inner, None)
        return [
            member
            for member in found
            if member["name"] not in OUR_MEMBERS and OUR_FEATURE not in member.get("features", ())
        ]

    def good(self, name: str) -> Any:
        """Return a value of a type, as small as may be."""
        info = self.types[name]
        match info["meta-type"]:
            case "builtin":
                return GOOD[info["json-type"]]
            case "enum":
                return info["values"][0]
            case "array":
                return [self.good(info["element-type"])]
            case "alternate":
                kinds = [each["type"] for each in info["members"]]
                simple = [each for each in kinds if self.types[each]["meta-type"] != "object"]
                return self.good((simple or kinds)[0])
        return self.whole(info, None)

    def whole(self, info: Info, branch: str | None) -> dict[str, Any]:
        """Return an object with what it must have, of a branch if there is one."""
        made = {
            member["name"]: branch
            if member["name"] == info.get("tag") and branch
            else self.good(member["type"])
            for member in self.members(info, branch)
            if "default" not in member
        }
        for member in self.members(info, branch):
            if member["name"] in NEEDED_TOGETHER:
                other, value = NEEDED_TOGETHER[member["name"]]
                made.setdefault(other, value)
        return made

    def fits(self, value: Any, name: str) -> bool:
        info = self.types[name]
        match info["meta-type"]:
            case "builtin":
                return bool(OF_TYPE[info["json-type"]](value))
            case "enum":
                return False
            case "array":
                return isinstance(value, list)
            case "alternate":
                return any(self.fits(value, each["type"]) for each in info["members"])
        return isinstance(value, dict)

    def of(self, name: str, depth: int) -> Iterator[Any]:
        """Yield values that are none of a type, or have something wrong inside."""
        wrong = [value for value in WRONG if not self.fits(value, name)]
        yield from self.source.sample(wrong, min(self.values, len(wrong)))
        info = self.types[name]
        match info["meta-type"]:
            case "array":
                yield from ([wrong] for wrong in self.of(info["element-type"], depth))
            case "alternate" if depth > 0:
                for each in info["members"]:
                    if self.types[each["type"]]["meta-type"] == "object":
                        yield from self.inside(each["type"], depth)
            case "object" if depth > 0:
                yield from self.inside(name, depth)

    def inside(self, name: str, depth: int) -> Iterator[dict[str, Any]]:
        """Yield objects with a member too few, one too many or a wrong one."""
        info = self.types[name]
        common = {member["name"] for member in info["members"]}
        branches = [each["case"] for each in self.branches(info)] or [None]
        for branch in branches:
            whole = self.whole(info, branch)
            yield whole | {"bogus": 1}
            for member in self.members(info, branch):
                if branch != branches[0] and member["name"] in common:
                    continue
                if "default" not in member:
                    yield {key: value for key, value in whole.items() if key != member["name"]}
                yield from (whole | {member["name"]: wrong} for wrong in self.of(member["type"], depth - 1))


def commands(types: Mapping[str, Info]) -> list[str]:
    """Name the commands of both."""
    return [
        name
        for name, info in types.items()
        if info["meta-type"] == "command" and name not in LEFT_OUT_COMMANDS and not name.startswith("__")
    ]


def conversation(seed: int) -> list[dict[str, Any]]:
    """Return the steps: all of them are wrong, or refused for their values."""
    schema = load(CHECKOUT / "schema", "system-schema.json").introspection()
    types = {info["name"]: info for info in schema}
    source = Random(seed)
    mistakes = Mistakes(types, source)
    steps: list[dict[str, Any]] = [{"reconnect": True}]
    names = commands(types)
    # Not yet negotiated, of which the command that does it would be the end.
    early = [name for name in names if name != "qmp_capabilities"]
    steps += [{"cmd": {"execute": name, "id": source.choice(IDS)}} for name in early]
    steps.append({"cmd": {"execute": "qmp_capabilities"}})
    for name in names:
        steps.append({"cmd": {"exec-oob": name, "id": source.choice(IDS), "arguments": source.choice(WRONG)}})
        wrong = source.choice([value for value in WRONG if not isinstance(value, dict)])
        steps.append({"cmd": {"execute": name, "arguments": wrong, "id": source.choice(IDS)}})
        arguments = types[name]["arg-type"]
        if any("default" not in member for member in types[arguments]["members"]):
            steps.append({"cmd": {"execute": name, "id": source.choice(IDS)}})
        depth = 1 if name in SHALLOW else DEPTH
        steps += [
            {"cmd": {"execute": name, "arguments": wrong, "id": source.choice(IDS)}}
            for wrong in mistakes.inside(arguments, depth)
        ]
    return steps


@pytest.mark.peer("qemu-system-x86_64")
@pytest.mark.parametrize("seed", [1])
def test_wrong_arguments_are_refused_as_qemu_refuses_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    case = qmpdiff.Case(name=f"seed {seed}", persona="system", machine="none", steps=conversation(seed))
    sides = {
        "QEMU": ("qemu-system-x86_64", "system"),
        "qmpd": (f"{sys.executable} -m qmpd.cli.system", "system"),
    }
    results = qmpdiff.run_case(case, sides, PATIENCE, keep=False)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        for found in qmpdiff.differing_steps(case, results["QEMU"], results["qmpd"])[:10]:
            qmpdiff.print_diff(*found)
    assert not report.getvalue(), f"-QEMU +qmpd\n{report.getvalue()}"


def test_a_seed_makes_wrong_arguments_for_every_command() -> None:
    steps = conversation(1)
    assert steps == conversation(1)
    assert steps != conversation(2)
    refused = {
        step["cmd"]["execute"]
        for step in steps
        if "arguments" in step.get("cmd", {}) and "execute" in step["cmd"]
    }
    assert {"blockdev-add", "blockdev-create", "device_add", "system_reset", "object-add"} <= refused
    assert len(steps) > 1500
