from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.commands.human.line import (
    Complaint,
    Flag,
    Number,
    Parameter,
    Rest,
    Settings,
    Size,
    Value,
    Word,
    name,
    values,
)

TWO_FLAGS = (Flag("n"), Flag("v"), Word("thing", optional=True))
MIB = 1 << 20


@pytest.mark.parametrize(
    ("parameters", "text", "found"),
    [
        (TWO_FLAGS, "", [False, False, None]),
        (TWO_FLAGS, "-n", [True, False, None]),
        (TWO_FLAGS, "-v a", [False, True, "a"]),
        (TWO_FLAGS, "-n -v a", [True, True, "a"]),
        (TWO_FLAGS, "-n-v", [True, True, None]),
        (TWO_FLAGS, "-v -n", [False, True, "-n"]),
        (TWO_FLAGS, "-nv", [True, False, "v"]),
        (TWO_FLAGS, '"-n"', [False, False, "-n"]),
        ((Word(), Word()), r'"a \"b\" \\ \n" \n', ['a "b" \\ \n', r"\n"]),
        ((Word(), Rest()), 'a  "b" c ', ["a", '"b" c ']),
        ((Settings(),), "", [""]),
        ((Settings(),), "a=b,c", ["a=b,c"]),
        ((Size(),), "1", [MIB]),
        ((Size(),), "1.5", [3 * MIB // 2]),
        ((Size(),), "0x10", [16 * MIB]),
        ((Size(),), "3k", [3072]),
        ((Size(),), "7B", [7]),
        ((Number(), Number(), Number(), Number()), "-0x10 10  010 0", [-16, 10, 8, 0]),
    ],
)
def test_a_line_is_read_by_what_its_command_takes(
    parameters: tuple[Parameter, ...], text: str, found: list[Value]
) -> None:
    assert values("do", parameters, text) == found


@pytest.mark.parametrize(
    ("parameters", "text", "complaint"),
    [
        (TWO_FLAGS, "-x", "do: unsupported option -x\n"),
        (TWO_FLAGS, "-n -n", "do: unsupported option -n\n"),
        (TWO_FLAGS, "-", "do: unsupported option -"),
        (TWO_FLAGS, "a b", "do: extraneous characters at the end of line\n"),
        (TWO_FLAGS, '"a', "do: thing expected\n"),
        ((Word(),), "", "do: string expected\n"),
        ((Word(),), r'"\x"', "do: string expected\n"),
        ((Rest(),), "  ", "do: string expected\n"),
        ((Settings(),), '"a', ""),
        ((Size(),), "x", "invalid size\n"),
        ((Size(),), "-1", "invalid size\n"),
        ((Size(),), "8E", "invalid size\n"),
        ((Size(),), "0x1k", "invalid size\n"),
        ((Size(),), "1x", "do: extraneous characters at the end of line\n"),
        ((Number(),), "", "unexpected end of expression\n"),
        ((Number(),), "-", "unexpected end of expression\n"),
        ((Number(),), "x", "invalid char 'x' in expression\n"),
        ((Number(), Number()), "1k 2", "invalid char 'k' in expression\n"),
        ((Number(),), "08", "do: extraneous characters at the end of line\n"),
        ((Number(),), str(1 << 64), "number too large\n"),
        ((Number(), Number()), "1 -2", "numbers are not calculated here\n"),
    ],
)
def test_what_does_not_fit_is_complained_about(
    parameters: tuple[Parameter, ...], text: str, complaint: str
) -> None:
    with pytest.raises(Complaint) as caught:
        values("do", parameters, text)
    assert caught.value.text == complaint


@given(st.text(alphabet=' \t\n"\\-nvax/.0123456789kM,=\x00', max_size=30))
def test_no_line_is_a_fault(text: str) -> None:
    called, after, rest = name(text)
    assert text.lstrip().startswith(called)
    assert text.endswith(after)
    assert after.endswith(rest)
    for parameters in (
        TWO_FLAGS,
        (Word(), Size()),
        (Settings(), Rest(optional=True)),
        (Flag("a"), Rest()),
        (Number(), Word()),
    ):
        try:
            found = values("do", parameters, rest)
        except Complaint:
            continue
        assert len(found) == len(parameters)
