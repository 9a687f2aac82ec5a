"""Two processes train what one trains, bit-equal when resumed; a killed one ends the run with its last state kept.

Real torchrun, gloo; what one process does alone, this one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import save_tiny_model

from lorsa_utils import store
from lorsa_utils.kit import cli, commands
from lorsa_utils.processes import World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]
ROOT = Path(__file__).resolve().parent.parent
Alone = Callable[..., tuple[int, str, str]]
SHAPE = "--n-heads 32 --n-qk 4 --k 4 --context 32 --held-out-tokens 600 --batch-size 5"


class Lab:
    """A tiny model, a text, and the command on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = random.Random(0)
        words = ["attention", "head", "layer", "of", "the", "model", "reads", "writes", "a", "token"]
        self.text = folder / "prose.txt"
        self.text.write_text(
            "\n\n".join(" ".join(rng.choices(words, k=120)) + "." for _ in range(40)), encoding="utf-8"
        )
        self.model = save_tiny_model(folder / "model", "llama")

    def arguments(self, out: str, *options: str, tokens: int = 3000, layer: str = "1") -> list[str]:
        places = ["--model", str(self.model), "--text", str(self.text), "--out", str(self.folder / out)]
        return [*f"train --layer {layer} --json --tokens {tokens} {SHAPE}".split(), *places, *options]

    def start(self, out: str, *options: str, **settings: Any) -> subprocess.Popen[str]:
        """Two processes."""
        data = str(self.folder / "data")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LORSA_DATA": data, "HF_HUB_OFFLINE": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lorsa_utils"]
        command = [sys.executable, *launcher, *self.arguments(out, *options, **settings)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, out: str, *options: str, **settings: Any) -> tuple[int, str, str]:
        process = self.start(out, *options, **settings)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return store.read_tensors(self.folder / out / "model.safetensors")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("torchrun"))


@pytest.fixture
def alone(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Alone]:
    """The same command in this process, with one thread too."""
    monkeypatch.setenv("LORSA_DATA", str(lab.folder / "data"))

    def run(out: str, *options: str, **settings: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main(lab.arguments(out, *options, **settings)), *capsys.readouterr()

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(n_threads)


def test_two_processes_train_what_one_trains(lab: Lab, alone: Alone) -> None:
    """Batches of five sequences over two ranks are uneven, and so is the last batch of the text."""
    single, together = alone("alone"), lab.run("together")
    assert single[0] == together[0] == 0, single[2] + together[2]
    one, two = json.loads(single[1]), json.loads(together[1])
    assert one.keys() == two.keys()
    assert two["fvu"] == pytest.approx(one["fvu"], abs=1e-5)
    expected = lab.weights("alone")
    for name, tensor in lab.weights("together").items():
        assert (tensor - expected[name]).abs().max() < 1e-5 * max(1.0, float(expected[name].abs().max())), name
    rows = [
        [json.loads(line) for line in (lab.folder / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("alone", "together")
    ]
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    assert rows[1][-1]["fvu"] == pytest.approx(rows[0][-1]["fvu"], abs=1e-4)
    # The same folder with another number of processes is refused in a sentence.
    code, out, err = alone("together", "--resume")
    assert (code, out) == (1, "")
    assert "was started with processes = 2, not 1; resume with the same settings" in err


def test_a_killed_process_ends_the_run_and_its_state_goes_on(lab: Lab) -> None:
    settings = {"tokens": 15_000}
    process = lab.start("killed", "--save-every-seconds", "0.05", **settings)
    state = lab.folder / "killed" / "state" / "state.safetensors"
    deadline = time.monotonic() + 200
    while not (state.is_file() and json.loads(store.read_tensor_metadata(state)["counters"])["step"] > 5):
        assert time.monotonic() < deadline, "no state was saved"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    second = next(
        child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"
    )
    os.kill(second.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0, err
    steps = json.loads(store.read_tensor_metadata(state)["counters"])["step"]
    assert steps > 5
    assert not (lab.folder / "killed" / "model.safetensors").exists()
    resumed, whole = lab.run("killed", "--resume", **settings), lab.run("whole", **settings)
    assert resumed[0] == whole[0] == 0, resumed[2] + whole[2]
    expected = lab.weights("whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lab.weights("killed").items())


def test_layers_spread_over_processes(lab: Lab, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = lab.run("spread", "--spread", "layers", layer="0,1")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["layers"].keys() == {"0", "1"}
    code, out, err = alone("one", layer="0,1")
    assert code == 0, err
    for layer in ("0", "1"):
        assert answer["layers"][layer]["fvu"] == json.loads(out)["layers"][layer]["fvu"]
    monkeypatch.setattr(commands, "join_world", lambda: contextlib.nullcontext(World(0, 2)))
    code, _, err = alone("few", "--spread", "layers", layer="1")
    assert code != 0
    assert "2 processes cannot share 1 layers; start fewer." in err
