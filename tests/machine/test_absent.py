from __future__ import annotations

import pytest

from qmpd.errors import Error
from qmpd.machine import absent, cpu_models
from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory

SCHEMA = load(schema_directory(), SYSTEM_SCHEMA)


@pytest.mark.parametrize("name", sorted(absent.ANSWERS))
def test_answers_are_what_the_schema_says(name: str) -> None:
    returns = SCHEMA.commands[name].definition.returns
    assert returns is not None
    SCHEMA.validate(returns, absent.ANSWERS[name])


@pytest.mark.parametrize("name", sorted(absent.REFUSALS))
def test_refusals_are_those_of_commands(name: str) -> None:
    error_class, text = absent.REFUSALS[name]
    assert name in SCHEMA.commands
    assert str(error_class(text)) == text


def test_models_of_processors_are_names_with_nothing_behind_them() -> None:
    for info in cpu_models.definitions():
        SCHEMA.validate("CpuDefinitionInfo", info)
        for kind, shown in (("static", "base"), ("full", info["name"])):
            model = {"name": info["name"], "props": {"svm": True}}
            assert cpu_models.expansion(kind, model) == {"model": {"name": shown, "props": {}}}


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(Error, match=r"^CPU model 'host' not found$"):
        cpu_models.expansion("full", {"name": "host"})
