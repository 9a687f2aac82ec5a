"""What this machine has and lacks, and what a profile or preset would cost here."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import psutil

from lorsa_utils import store
from lorsa_utils.exceptions import UserError
from lorsa_utils.fetch import EMBEDDED_NAME
from lorsa_utils.kit import presets
from lorsa_utils.kit.notebook import check_versions, provenance
from lorsa_utils.kit.reproduce import expected_minutes
from lorsa_utils.view.figures import can_draw_png

PACKAGES = {
    "papermill": "notebooks cannot be run by `lorsa reproduce`; pip install 'lorsa-utils[notebooks]'",
    "datasets": "--dataset does not work; pip install 'lorsa-utils[hub]'",
}


def report(profile: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """What `lorsa doctor` prints."""
    memory, embedded = psutil.virtual_memory(), store.data_dir() / "models" / EMBEDDED_NAME
    fetched, images = (embedded / "source.json").is_file(), can_draw_png()
    answer: dict[str, Any] = {
        **provenance(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "data": str(store.data_dir()),
        "disk_free_gb": round(store.free_bytes(store.data_dir()) / 1e9, 1),
        "embedded_model": str(embedded) if fetched else None,
        "static_images": images,
        "missing": missing(fetched, images),
    }
    if profile:
        minutes = None
        with contextlib.suppress(UserError):  # the package without its notebooks
            minutes = expected_minutes(profile)
        answer["estimate"] = presets.profile_estimate(profile, minutes)
    if preset:
        answer["preset"] = presets.preset_estimate(preset)
    return answer


def missing(fetched: bool, images: bool) -> list[str]:
    """One sentence per missing thing, with its fix."""
    sentences = [] if fetched else ["the embedded model: it is fetched when first needed, or now by `lorsa fetch`"]
    sentences += [] if images else ["Chrome or Chromium: figures have no static images; install chromium"]
    sentences += [f"{name}: {effect}" for name, effect in PACKAGES.items() if importlib.util.find_spec(name) is None]
    try:
        check_versions()
    except UserError as error:
        sentences.append(str(error))
    return sentences
