from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.cli import check
from qmpd.cli import schema as schema_command
from qmpd.qapi import Schema
from qmpd.qapi.command_file import problems


def found(schema: Schema, text: str) -> list[tuple[int, str]]:
    return [(problem.line, problem.text) for problem in problems(schema, text)]


def test_good_commands_give_no_problem(schema: Schema) -> None:
    text = """{"execute": "nothing"} {"exec-oob": "nothing", "id": 1}

    {'execute': 'blockdev-add',
     'arguments': {'driver': 'null-co'}}
    { "execute": "device_add", "arguments": { "anything": 1 } }"""
    assert found(schema, text) == []


def test_each_bad_command_is_named_at_the_line_where_it_begins(schema: Schema) -> None:
    text = """{"execute": "nothing"}
{"execute":
 "blockdev-add"} {"execute": "gone"}

{"execute": "create",
 "arguments": {"job-id": 1}}"""
    assert found(schema, text) == [
        (2, "Parameter 'driver' is missing"),
        (3, "The command gone has not been found"),
        (5, "Invalid parameter type for 'job-id', expected: string"),
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "nothing", "argument": {}}', "QMP input member 'argument' is unexpected"),
        ('{"execute": "nothing", "arguments": []}', "QMP input member 'arguments' must be an object"),
        (
            '{"execute": "nothing", "exec-oob": "nothing"}',
            "QMP input member 'execute' clashes with 'exec-oob'",
        ),
        ('{"exec-oob": "maybe"}', "The command maybe does not support OOB"),
    ],
)
def test_the_shape_of_a_request_is_checked_in_the_monitors_words(
    schema: Schema, text: str, error: str
) -> None:
    assert found(schema, "\n" + text) == [(2, error)]


def test_checking_goes_on_after_text_that_is_not_json(schema: Schema) -> None:
    text = '{"execute": blub}\n{"execute": "gone"}\n{"execute": "nothing"'
    assert found(schema, text) == [
        (1, "JSON parse error, invalid keyword 'blub'"),
        (2, "The command gone has not been found"),
        (3, "JSON parse error, premature EOI"),
    ]


@settings(deadline=None)
@given(st.text(st.sampled_from("{}[]:,\"'\n ae"), max_size=60))
def test_checking_any_text_ends_with_lines_in_order(schema: Schema, text: str) -> None:
    lines = [problem.line for problem in problems(schema, text)]
    assert lines == sorted(lines)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines)


def test_qmpd_check_prints_file_line_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text('{"execute": "query-version"}\n')
    bad.write_text('\n{"execute": "blockdev-add", "arguments": {"driver": "raw"}}\n')
    assert check.run([str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert check.run([str(good), str(bad)]) == 1
    assert capsys.readouterr().out == f"{bad}:2: Parameter 'file' is missing\n"


def test_qmpd_check_says_which_file_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.run([str(tmp_path / "gone")]) == 1
    assert "gone: No such file or directory" in capsys.readouterr().err


def test_qmpd_schema_prints_or_writes_json_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schema_command.run([]) == 0
    printed = capsys.readouterr().out
    assert "blockdev-add" in json.loads(printed)["$defs"]
    assert schema_command.run(["-o", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.json").read_text() == printed
    assert schema_command.run(["-o", str(tmp_path)]) == 1


def test_qmpd_schema_prints_introspection(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema_command.run(["--introspection"]) == 0
    assert any(info["name"] == "blockdev-add" for info in json.loads(capsys.readouterr().out))
