"""Data folders of their own without a network, and commands whose answers are looked at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import lorsa


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lorsa_utils.view.figures.can_draw_png", lambda: False)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What a command that succeeds prints as JSON."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert lorsa(*arguments, "--json") == 0, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out))

    return run


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence on stderr of a command that must fail with exit code 1 and nothing on stdout."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert lorsa(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert last.startswith("lorsa: ")
        return last

    return run
