"""Files written atomically (a reader sees the old file or the new one, never half of one), hashes, and `data/`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lorsa_utils.exceptions import UserError

_UMASK = os.umask(0)  # there is no way to read it but to set it
os.umask(_UMASK)

StrPath = str | os.PathLike[str]

CHECKOUT = Path(__file__).resolve().parent.parent
"""The parent of this package: the repository's root in a checkout."""


@contextlib.contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path; on success fsync it and rename it to `path`, on failure remove it.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # safetensors writes files that only their owner can read; these are to be shared like any other.
        os.chmod(temporary, 0o666 & ~_UMASK)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        sentence = f"Cannot write {target} ({error}); choose a folder you can write to."
        if getattr(error, "errno", None) == 28 or "No space left" in str(error):
            sentence = f"The disk is full: {target} was not written; free some space and run the same command again."
        raise UserError(sentence) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: StrPath) -> None:
    """Delete temporary files of killed writers; nobody else may be writing in `folder`."""
    for leftover in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: StrPath, content: str) -> None:
    """Write atomically, as UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: StrPath, content: Any) -> None:
    """Write atomically, indented, with keys in the given order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: StrPath) -> Any:
    """Content of a file; UserError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); rebuild it or restore a copy.") from error


def write_tensors(path: StrPath, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write atomically, as one safetensors file."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def read_tensors(path: StrPath, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of a file, `compact` ones as float32; UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; check the path or rebuild it.")
    try:
        return expand(load_file(path, device=str(device)), path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and rebuild it.") from error


SCALE = ".scale"
"""Suffix for the scales of an int8 tensor."""


def compact(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor [..., n] as int8 with a float32 scale per row [...]: its largest magnitude becomes 127."""
    rows = tensor.detach().float()
    scale = rows.abs().amax(dim=-1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (rows / scale[..., None]).round()
    return {name: steps.to(torch.int8), name + SCALE: scale}


def expand(tensors: dict[str, torch.Tensor], path: StrPath) -> dict[str, torch.Tensor]:
    """The inverse of `compact`; UserError, with `path`, if scales do not fit."""
    for name in [name for name in tensors if name + SCALE in tensors]:
        scale = tensors.pop(name + SCALE)
        if tensors[name].dtype != torch.int8 or tensors[name].shape[:-1] != scale.shape:
            raise UserError(f"{path}: {name + SCALE} does not belong to {name}; restore a copy of the file.")
        tensors[name] = tensors[name].float() * scale[..., None]
    return tensors


def read_tensor_metadata(path: StrPath) -> dict[str, str]:
    """Metadata in a safetensors header."""
    with safe_open(path, framework="pt") as handle:
        return dict(handle.metadata() or {})


def sha256_file(path: StrPath) -> str:
    """Of its content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """Of a JSON value; key order does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def free_bytes(path: StrPath) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def require_free_bytes(path: StrPath, needed: int, what: str) -> None:
    """UserError if `needed` bytes plus a 1 GiB reserve do not fit on the disk of `path`."""
    free = free_bytes(path)
    if needed + (1 << 30) > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB in {path}, but only {free / 1e9:.1f} GB are free "
            "(1 GiB is kept in reserve); free some space, ask for less, or choose another folder."
        )


def require_writable(folder: StrPath) -> Path:
    """Create `folder` if needed; UserError if it cannot be written."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"Cannot write to {path} ({error.strerror}); choose a folder you can write to.") from error
    return path


def data_dir() -> Path:
    """$LORSA_DATA if set, else `data/` in the checkout, else `./data`."""
    if configured := os.environ.get("LORSA_DATA"):
        return Path(configured)
    return CHECKOUT / "data" if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd() / "data"
