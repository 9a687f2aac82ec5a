"""Code in a process of its own that sees the package and the tests, so that it can be killed."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code with as many threads as this process has: sums then have the same order."""
    code = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n{script}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
