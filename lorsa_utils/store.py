"""Files written atomically, hashes, and where the kit's own files are.

Every artefact of the kit goes through this module: a file is written under a temporary name in the same folder, flushed
to the disk, and renamed. A reader therefore sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
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

CHECKOUT = Path(__file__).resolve().parent.parent
"""Folder that holds this package: the root of the repository where it runs from a checkout."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it.

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
        raise _write_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete temporary files that killed writers left in `folder`. Nobody else may be writing there."""
    for leftover in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _write_error(target: Path, error: Exception) -> UserError:
    """Turn an operating-system error met while writing into a sentence with its fix."""
    text = str(error)
    if getattr(error, "errno", None) == 28 or "No space left" in text:
        return UserError(f"The disk is full: {target} was not written; free some space and run the same command again.")
    return UserError(f"Cannot write {target} ({text}); choose a folder you can write to.")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write `content` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON (keys in the order given), whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again or restore a copy.") from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


def read_tensors(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file; tensors that `compact` made small come back as float32.

    Raises:
        UserError: the file is missing, cut short or not safetensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; check the path or make it again.")
    try:
        return expand(load_file(path, device=str(device)), path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and make it again.") from error


SCALE = ".scale"
"""Ending of the name under which the scales of a tensor of small integers are stored."""


def compact(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor [..., n] as int8 with one float32 scale a row [...]: the largest value of a row becomes 127, half a step is lost."""
    scale = tensor.detach().float().abs().amax(dim=-1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (tensor.detach().float() / scale[..., None]).round()
    return {name: steps.to(torch.int8), name + SCALE: scale}


def expand(tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The inverse of `compact` for every tensor that has scales beside it; `path` is named when they do not fit."""
    scales = {
        name: tensors.pop(name)
        for name in list(tensors)
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors
    }
    for name, scale in scales.items():
        small = name.removesuffix(SCALE)
        if tensors[small].dtype != torch.int8 or tensors[small].shape[:-1] != scale.shape:
            raise UserError(f"{path}: {name} does not belong to {small}; restore a copy of the file.")
        tensors[small] = tensors[small].float() * scale[..., None]
    return tensors


def read_tensor_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The string metadata in a safetensors file's header."""
    with safe_open(path, framework="pt") as handle:
        return dict(handle.metadata() or {})


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(content: Any) -> str:
    """SHA-256 of a JSON value; the same for the same value whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free bytes on the disk that holds `path` (or its nearest existing parent)."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_free_bytes(path: str | os.PathLike[str], needed: int, what: str) -> None:
    """Refuse before starting when `needed` bytes plus a 1 GiB reserve do not fit on the disk of `path`.

    Raises:
        UserError: the disk has too little room.
    """
    free = free_bytes(path)
    if needed + (1 << 30) > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB in {path}, but only {free / 1e9:.1f} GB are free (1 GiB is kept in reserve); "
            "free some space, ask for less, or choose another folder."
        )


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` when needed and prove that it can be written.

    Raises:
        UserError: it cannot.
    """
    path = Path(folder)
    probe = path / f".write-test-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"Cannot write to {path} ({error.strerror}); choose a folder you can write to.") from error
    return path


def data_dir() -> Path:
    """The `data/` folder: $LORSA_DATA when set, else `data/` of the checkout that holds this package, else `./data`."""
    if configured := os.environ.get("LORSA_DATA"):
        return Path(configured)
    return CHECKOUT / "data" if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd() / "data"
