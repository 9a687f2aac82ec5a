"""What every notebook calls: provenance at the top, figures and numbers on the way, expected values at the end.

run = notebook.start("02_train_lorsa", PROFILE, RUN_DIR)
folder = run.stage("lorsa", {"layer": 17}, make)     # done once, found again later
run.show(figure, "P4_layer_fvu", "What one sees.")
run.record("fvu", 0.19)
run.finish()                                          # asserts data/expected/02_train_lorsa.json
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import math
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from filelock import FileLock

from lorsa_utils import __version__, store
from lorsa_utils.config import Profile, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.view import figures

TESTED_VERSIONS = {"torch": ("2.8", "3"), "transformers": ("5", "6")}
"""Package to the first tested version and the first untested one."""


# ---- provenance


def check_versions() -> None:
    """UserError, with the command that helps, for untested versions of torch and transformers."""
    for package, bounds in TESTED_VERSIONS.items():
        version = metadata.version(package)
        first, release, end = (re.findall(r"\d+", text)[:2] for text in (bounds[0], version, bounds[1]))
        if not [*map(int, first)] <= [*map(int, release)] < [*map(int, end)]:
            raise UserError(
                f"{package} {version} is outside the tested range; run: "
                f'pip install -c constraints.txt "{package}>={bounds[0]},<{bounds[1]}"'
            )


@functools.cache
def git_commit() -> str | None:
    """Commit of this package's checkout, with `+` when files differ from it; None without one."""
    if not (store.CHECKOUT / ".git").exists():
        return None  # an installed package may lie in somebody else's repository
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        result = subprocess.run(command, cwd=store.CHECKOUT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def provenance() -> dict[str, str]:
    """Versions, commit and device of this process."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = f"cuda ({torch.cuda.get_device_name(0)})" if on_gpu else f"cpu ({torch.get_num_threads()} threads)"
    versions = {package: metadata.version(package) for package in TESTED_VERSIONS}
    about = {"kit": __version__, "commit": git_commit() or "none", "python": platform.python_version()}
    return {**about, **versions, "device": device}


# ---- expected values


class Check(NamedTuple):
    """One recorded value against what is expected of it."""

    key: str
    value: Any
    """None if missing."""
    expected: str
    """Human-readable; empty when nothing is expected."""
    result: str
    """PASS, FAIL, or a dash when nothing is expected."""


def expected_values(name: str, section: str) -> dict[str, dict[str, Any]]:
    """A section of `data/expected/<name>.json`: `<profile>`, or `<profile>_checkpoint` for the checkpoint alone."""
    return dict(read_object(store.data_dir() / "expected" / f"{name}.json").get(section, {}))


def check_values(values: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Compare values with expectations {min}, {max} or {value, tolerance}, each with an optional note."""
    checks = []
    for key in dict.fromkeys([*values, *expected]):
        rule = expected.get(key)
        if rule is None:
            checks.append(Check(key, values[key], "", "-"))
        else:
            passed = key in values and _meets(values[key], rule, key)
            checks.append(Check(key, values.get(key), _describe(rule), "PASS" if passed else "FAIL"))
    return checks


def _meets(value: Any, rule: Mapping[str, Any], key: str) -> bool:
    if not set(rule) & {"min", "max", "value"}:
        raise UserError(f"The expected value of {key!r} has neither min, max nor value; repair it in data/expected.")
    if not isinstance(value, int | float):
        return "value" in rule and value == rule["value"]
    asked = rule.get("value", value)
    close = isinstance(asked, int | float) and abs(value - asked) <= rule.get("tolerance", 0)
    return close and rule.get("min", -math.inf) <= value <= rule.get("max", math.inf)


def _describe(rule: Mapping[str, Any]) -> str:
    ways = {
        "value": "{value}" + " ± {tolerance}" * ("tolerance" in rule),
        "min": "at least {min}",
        "max": "at most {max}",
    }
    bounds = ", ".join(way.format(**rule) for name, way in ways.items() if name in rule)
    return bounds + (f" ({rule['note']})" if rule.get("note") else "")


# ---- context


class Context:
    """One notebook's run: what it shows and records. Made by `start`."""

    def __init__(self, name: str, profile: Profile, folder: Path, seed: int) -> None:
        self.name, self.profile, self.folder, self.seed = name, profile, folder, seed
        self.about: dict[str, Any] = {"model": profile.model, "layer": profile.layer, "tokens": profile.train_tokens}
        """What figures say of their run by default; a notebook that looks at another module changes it."""
        self.layers = profile.layers
        """Layers compared; `modules_at_hand` may find fewer than the profile names."""
        self.checkpoint_alone = False
        """Whether `modules_at_hand` found only the kit's own checkpoint; `finish` then expects other values."""

    def stage(
        self, name: str, key: Mapping[str, Any], make: Callable[[Path], object], code: Sequence[ModuleType] = ()
    ) -> Path:
        """Do a costly step once per run folder, for all notebooks that name it with the same key.

        `make` fills the folder `<folder>/stages/<name>-<hash of key>`, and resumes what a killed run left there. `key`
        is all that the result depends on, as JSON values, besides the source of the modules in `code`. stage.json,
        written last, marks a complete stage and lists its files; when one is missing the stage is rebuilt.
        """
        sources = {"code": [store.sha256_file(str(module.__file__)) for module in code]} if code else {}
        full_key = {"kit": __version__, "stage": name, **key, **sources}
        target = self.folder / "stages" / f"{name}-{store.sha256_json(full_key)[:8]}"
        marker = target / "stage.json"
        if marker.is_file():
            if all((target / file).is_file() for file in store.read_json(marker)["files"]):
                return target
            marker.unlink()
        make(store.require_writable(target))
        made = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
        store.write_json(marker, {"key": full_key, "files": made})
        return target

    def show(self, figure: go.Figure, label: str, caption: str, data: pd.DataFrame | None = None, **facts: Any) -> Path:
        """Save a figure under `<folder>/figures/` and display it: interactive in Jupyter, as a static image elsewhere.

        `label` is the file name, starting with the paper item, such as `P4_layer_fvu`; `data` the numbers for the CSV,
        by default the figure's own. `facts` are added to the figure's record, where `model`, `layer` and `tokens` are
        the profile's unless given (None where they do not apply). The title says when a run is scaled down, which a
        figure without a language model never is.
        """
        figure = go.Figure(figure)
        title = figure.layout.title.text or label
        about = self.about | facts
        if self.profile.is_scaled_down and about["model"] is not None and "scaled down" not in title:
            title += f" ({self.profile.name} profile, scaled down)"
        figure.update_layout(title_text="<br>".join(textwrap.wrap(title.replace("<br>", " "), 68)))
        saved = figures.save_figure(figure, label, self.folder / "figures", data, caption)
        versions = {key: value for key, value in provenance().items() if key != "commit"}
        record = {"label": label, "caption": caption, "notebook": self.name, "profile": self.profile.name, **about}
        record |= {"seed": self.seed, "commit": git_commit(), "versions": versions}
        store.write_json(saved.with_suffix(".json"), {key: _plain(value, key) for key, value in record.items()})
        bundle = {"text/plain": f"{label}. {caption}", "application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        if (png := saved.with_suffix(".png")).is_file():
            bundle["image/png"] = base64.b64encode(png.read_bytes()).decode()
        _display(bundle)
        return saved

    def record(self, key: str, value: Any) -> None:
        """Write a value into `<folder>/results.json` under this notebook's name.

        Raises:
            UserError: it is not a finite number, a text, a truth value, None or a list or dict of them.
        """
        with changed_json(self.folder / "results.json") as results:
            results.setdefault(self.name, {})[key] = _plain(value, key)

    def finish(self) -> pd.DataFrame:
        """Check recorded values against `data/expected/<notebook>.json`; columns `key`, `value`, `expected`, `result`.

        Raises:
            AssertionError: names every value that missed its expectation; the table is printed first.
        """
        section = self.profile.name + ("_checkpoint" if self.checkpoint_alone else "")
        expected = expected_values(self.name, section)
        checks = check_values(read_results(self.folder).get(self.name, {}), expected)
        table = pd.DataFrame(checks, columns=Check._fields)
        failed = [
            f"{key} is {value}, expected {expected}" for key, value, expected, result in checks if result == "FAIL"
        ]
        if failed:
            print(table.to_string(index=False))
            raise AssertionError(f"{self.name} ({section}): {'; '.join(failed)}")
        return table


def start(name: str, profile: str, run_dir: str | Path = "", seed: int = 0) -> Context:
    """Begin a notebook: check versions, say where numbers come from, forget its earlier results.

    `profile` is `smoke`, `laptop`, `paper` or a preset. Where its model's weights are gated or out of reach, a banner
    says so and the run continues with the embedded model in the sizes of the laptop profile. `run_dir` is
    data/runs/<profile> when empty. Everything random in the notebook derives from `seed`.

    Raises:
        UserError: an untested version of torch or transformers, no such profile, or a folder that cannot be written.
    """
    check_versions()
    settings, banner = _within_reach(get_profile(profile))
    folder = store.require_writable(Path(run_dir) if run_dir else store.data_dir() / "runs" / profile)
    with changed_json(folder / "results.json") as results:
        results[name] = {}
    _show_banner(folder, name, banner)
    facts = provenance()
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"notebook {name}  profile {settings.name}  seed {seed}")
    return Context(name, settings, folder, seed)


def _within_reach(profile: Profile) -> tuple[Profile, str | None]:
    """The laptop's profile and a banner when the model's weights are gated or out of reach."""
    if profile.is_scaled_down:
        return profile, None
    from lorsa_utils.models import require_available

    try:
        require_available(profile.model)
    except UserError as error:
        instead = get_profile("laptop")
        return instead, f"{error} This run goes on with {instead.model} in the sizes of the laptop profile."
    return profile, None


BANNERS_FILE = "banners.json"


def banners(folder: str | Path) -> list[str]:
    """What pages about a run must say first: that its model is not the one asked for."""
    return sorted(set(read_object(Path(folder) / BANNERS_FILE).values()))


def profile_of_run(folder: str | Path, profile: str) -> str:
    """The profile that a run's numbers are really of: `laptop` where a banner says its model was out of reach."""
    return "laptop" if banners(folder) else profile


def _show_banner(folder: Path, name: str, banner: str | None) -> None:
    file = folder / BANNERS_FILE
    if banner or name in read_object(file):
        with changed_json(file) as kept:
            kept.pop(name, None)
            kept |= {name: banner} if banner else {}
    style = "border: 2px solid #b45309; background: #fef3c7; color: #451a03; padding: 0.6em 1em; font-weight: bold"
    page = f'<div role="alert" style="{style}">{html.escape(banner or "")}</div>'
    if banner and not _display({"text/plain": banner, "text/html": page}):
        print(banner)


# ---- results


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return dict(store.read_json(file)) if file.is_file() else {}


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All recorded values: notebook to key to value."""
    return read_object(Path(folder) / "results.json")


@contextlib.contextmanager
def changed_json(file: Path) -> Iterator[dict[str, Any]]:
    """Content of a file to change; locked, because notebooks may run side by side in one folder."""
    with FileLock(file.with_name(f".{file.name}.lock")):
        content = read_object(file)
        yield content
        store.write_json(file, content)


def _plain(value: Any, key: str) -> Any:
    """A JSON value from Python, numpy or torch."""

    def convert(item: Any) -> Any:
        return item.tolist() if hasattr(item, "tolist") else os.fspath(item)

    try:
        return json.loads(json.dumps(value, allow_nan=False, default=convert))
    except ValueError as error:
        raise UserError(f"{key} is {value}, which is no result; look for the step that made it.") from error
    except TypeError as error:
        raise UserError(f"{key} is a {type(value).__name__}; record a number, a text or a list of them.") from error


def _display(bundle: Mapping[str, Any]) -> bool:
    """Show something in several forms; False outside a notebook."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        return False
    if get_ipython() is None:
        return False
    display(dict(bundle), raw=True)
    return True
