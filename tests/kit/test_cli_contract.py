"""The commands as other people's scripts call them: each name, option, default and choice is in `cli_contract.json`."""

import json
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperOption
from typer.main import get_command

from lorsa_utils.kit import cli

RECORD = Path(__file__).with_name("cli_contract.json")


def option(parameter: Any) -> dict[str, Any]:
    flag = getattr(parameter, "is_flag", False)
    several = parameter.nargs == -1 or parameter.multiple
    default = parameter.default if parameter.default is None else parameter.process_value(None, parameter.default)
    return {
        "names": sorted(parameter.opts) if isinstance(parameter, TyperOption) else [parameter.metavar],
        "default": default,
        "required": parameter.required,
        "choices": sorted(parameter.type_descriptor.choices) if parameter.type_descriptor.is_choice else None,
        "takes": "nothing" if flag else "several" if several else "one",
    }


def commands() -> dict[str, list[dict[str, Any]]]:
    """Name of each command to its options and positional arguments."""
    group: Any = get_command(cli.app)
    kinds = (TyperArgument, TyperOption)
    return {
        name: [option(parameter) for parameter in command.params if isinstance(parameter, kinds)]
        for name, command in group.commands.items()
    }


def test_commands_are_those_of_the_record() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    declared = json.loads(json.dumps(commands()))
    assert list(declared) == list(recorded)
    for name, options in recorded.items():
        by_name = {option["names"][0]: option for option in declared[name]}
        assert by_name == {option["names"][0]: option for option in options}, name
        assert len(by_name) == len(declared[name]), name
