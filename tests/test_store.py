"""Files are whole or absent, errors are sentences, hashes are those of the content."""

import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from safetensors import SafetensorError
from scripts import run_script

from lorsa_utils import store


def test_failure_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    store.write_json(target, {"step": 1})
    with pytest.raises(RuntimeError, match="stop"), store.atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert store.read_json(target) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_nothing_appears_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.txt"
    with store.atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    store.write_tensors(target, {"w": torch.arange(3)})
    script = """
import os, signal, sys
from lorsa_utils import store
with store.atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_script(script, target).returncode == -signal.SIGKILL
    assert store.read_tensors(target)["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "write",
    [
        lambda place: store.write_text(place / "x.txt", "text"),
        lambda place: store.write_json(place / "x.json", {}),
        lambda place: store.write_tensors(place / "x.safetensors", {"w": torch.zeros(2)}),
        store.require_writable,
    ],
)
def test_unwritable_place_is_one_sentence(tmp_path: Path, write: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("in the way of everybody, even root")
    with refused("^Cannot write .*; choose a folder you can write to"):
        write(tmp_path / "file" / "below")


def test_full_disk_says_so_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bin"
    store.write_bytes(target, b"old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with refused("^The disk is full: .*x.bin was not written"):
        store.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_full_disk_met_by_the_tensor_writer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with refused("The disk is full"):
        store.write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(8)})
    assert not list(tmp_path.iterdir())


@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(
        [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    ),
    seed=st.integers(0, 1000),
)
def test_tensors_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    store.write_tensors(path, tensors, {"kind": "test"})
    back = store.read_tensors(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_transposed_tensors_that_need_gradients_are_written_too(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    store.write_tensors(tmp_path / "w.safetensors", {"w": weight.T})
    assert torch.equal(store.read_tensors(tmp_path / "w.safetensors")["w"], weight.detach().T)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    store.write_tensors(path, {"w": torch.arange(100)})
    whole = path.read_bytes()
    for content in (whole[:-8], whole[:4], b"", b"\xff" * 64, b"PK\x03\x04" + bytes(60)):
        path.write_bytes(content)
        with refused("w.safetensors is damaged"):
            store.read_tensors(path)
    with refused("does not exist"):
        store.read_tensors(tmp_path / "absent.safetensors")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(content=JSON)
def test_json_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    store.write_json(path, content)
    assert store.read_json(path) == content


def test_json_that_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    store.write_json(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json(path, {"loss": float("nan")})
    assert store.read_json(path) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.json", b'{"step": ', "not valid JSON"),
        ("binary.json", b"\x80\x81\xff", "not valid JSON"),
        ("absent.json", None, "Cannot read"),
        (".", None, "Cannot read"),
    ],
)
def test_unreadable_json_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(words):
        store.read_json(tmp_path / name)


def test_hashes_are_those_of_the_content(tmp_path: Path) -> None:
    content = os.urandom((1 << 22) + 17)
    (tmp_path / "x").write_bytes(content)
    assert store.sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert store.sha256_json({"a": 1, "b": [1, 2]}) == store.sha256_json({"b": [1, 2], "a": 1})
    assert store.sha256_json({"a": [1, 2]}) != store.sha256_json({"a": [2, 1]})


def test_too_little_room_is_refused_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.free_bytes(tmp_path / "not" / "there" / "yet") > 0
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store.require_free_bytes(tmp_path, 2 << 30, "The cache")
    with refused("^The cache needs 2.1 GB"):
        store.require_free_bytes(tmp_path, (2 << 30) + 1, "The cache")


def test_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert store.require_writable(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert not list((tmp_path / "new" / "run").iterdir())


def test_data_folder_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path))
    assert store.data_dir() == tmp_path
    monkeypatch.delenv("LORSA_DATA")
    assert store.data_dir() == Path(store.__file__).resolve().parent.parent / "data"
