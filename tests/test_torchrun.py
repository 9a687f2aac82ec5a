"""Two processes train what one trains, bit-equal when resumed; a killed one ends the run with its last state kept.

Real torchrun, gloo.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from scripts import ROOT
from tiny_models import save_tiny_model

from lorsa_utils import store
from lorsa_utils.training import read_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]
SHAPE = "--n-heads 32 --n-qk 4 --k 4 --context 32 --held-out-tokens 600 --batch-size 5"


class Lab:
    """A tiny model, a text, and the command on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = random.Random(0)
        words = ["attention", "head", "layer", "of", "the", "model", "reads", "writes", "a", "token"]
        text = "\n\n".join(" ".join(rng.choices(words, k=120)) + "." for _ in range(40))
        (folder / "prose.txt").write_text(text, encoding="utf-8")
        save_tiny_model(folder / "model", "llama")

    def start(
        self, out: str, processes: int, *options: str, tokens: int = 3000, layer: str = "1"
    ) -> subprocess.Popen[str]:
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}" if processes > 1 else ""
        places = {"--model": "model", "--text": "prose.txt", "--out": out}
        command = f"{launcher} -m lorsa_utils train --layer {layer} --json --tokens {tokens} {SHAPE}".split()
        command += [word for name, place in places.items() for word in (name, str(self.folder / place))]
        data = str(self.folder / "data")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LORSA_DATA": data, "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *command, *options], cwd=ROOT, env=environment, text=True, **pipes)

    def run(self, *arguments: Any, **settings: Any) -> tuple[int, str, str]:
        process = self.start(*arguments, **settings)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return store.read_tensors(self.folder / out / "model.safetensors")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("torchrun"))


def test_two_processes_train_what_one_trains(lab: Lab) -> None:
    """Batches of five sequences over two ranks are uneven, and so is the last batch of the text."""
    alone, together = lab.run("alone", 1), lab.run("together", 2)
    assert alone[0] == together[0] == 0, alone[2] + together[2]
    one, two = json.loads(alone[1]), json.loads(together[1])
    assert one.keys() == two.keys()
    assert two["fvu"] == pytest.approx(one["fvu"], abs=1e-5)
    expected = lab.weights("alone")
    for name, tensor in lab.weights("together").items():
        assert (tensor - expected[name]).abs().max() < 1e-5 * max(1.0, float(expected[name].abs().max())), name
    rows = [read_log(lab.folder / out) for out in ("alone", "together")]
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    assert rows[1][-1]["fvu"] == pytest.approx(rows[0][-1]["fvu"], abs=1e-4)
    # The same folder with another number of processes is refused in a sentence.
    code, out, err = lab.run("together", 1, "--resume")
    assert (code, out) == (1, "")
    assert "was started with processes = 2, not 1; resume with the same settings" in err


def test_a_killed_process_ends_the_run_and_its_state_goes_on(lab: Lab) -> None:
    settings = {"tokens": 15_000}
    process = lab.start("killed", 2, "--save-every-seconds", "0.05", **settings)
    state = lab.folder / "killed" / "state" / "state.safetensors"
    deadline = time.monotonic() + 200
    while not (state.is_file() and json.loads(store.read_tensor_metadata(state)["counters"])["step"] > 5):
        assert time.monotonic() < deadline, "no state was saved"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0, err
    steps = json.loads(store.read_tensor_metadata(state)["counters"])["step"]
    assert steps > 5
    assert not (lab.folder / "killed" / "model.safetensors").exists()
    resumed, whole = lab.run("killed", 2, "--resume", **settings), lab.run("whole", 2, **settings)
    assert resumed[0] == whole[0] == 0, resumed[2] + whole[2]
    expected = lab.weights("whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lab.weights("killed").items())


def test_layers_spread_over_processes(lab: Lab) -> None:
    code, out, err = lab.run("spread", 2, "--spread", "layers", layer="0,1")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["layers"].keys() == {"0", "1"}
    code, out, err = lab.run("one", 1, layer="0,1")
    assert code == 0, err
    for layer in ("0", "1"):
        assert answer["layers"][layer]["fvu"] == json.loads(out)["layers"][layer]["fvu"]
    code, _, err = lab.run("few", 2, "--spread", "layers", layer="1")
    assert code != 0
    assert "2 processes cannot share 1 layers; start fewer." in err
