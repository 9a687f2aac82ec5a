"""The commands as other people's scripts call them: each name, option, default and choice is in `cli_contract.json`."""

import argparse
import json
from pathlib import Path
from typing import Any

from lorsa_utils.config import TrainConfig
from lorsa_utils.kit import cli

RECORD = Path(__file__).with_name("cli_contract.json")


def _default(action: argparse.Action) -> Any:
    """Options of `lorsa train` that stay away until they are given leave the default to TrainConfig."""
    return getattr(TrainConfig(), action.dest) if action.default is argparse.SUPPRESS else action.default


def option(action: argparse.Action) -> dict[str, Any]:
    flag = action.nargs == 0
    return {
        "names": sorted(action.option_strings) or [str(action.metavar)],
        "default": False if flag else _default(action),
        "required": action.required and action.nargs != "*",
        "choices": sorted(action.choices) if action.choices else None,
        "takes": "nothing" if flag else "several" if action.nargs in ("+", "*") else "one",
    }


def commands() -> dict[str, list[dict[str, Any]]]:
    """Name of each command to its options, positional arguments first."""
    (sub,) = (action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {
        name: [option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        for name, parser in sub.choices.items()
    }


def test_commands_are_those_of_the_record() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(commands()))
    assert list(found) == list(recorded)
    for name, options in recorded.items():
        by_name = {option["names"][0]: option for option in found[name]}
        assert by_name == {option["names"][0]: option for option in options}, name
