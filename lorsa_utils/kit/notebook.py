"""What every notebook calls: provenance at the top, figures and numbers on the way, expected values at the end.

run = notebook.start("02_train_lorsa", PROFILE, RUN_DIR)
folder = run.stage("lorsa", {"layer": 17}, make)     # done once, found again later
run.show(figure, "P4_layer_fvu", "What one sees.")
run.record("fvu", 0.19)
run.finish()                                          # asserts data/expected/02_train_lorsa.json
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from filelock import FileLock

from lorsa_utils import __version__, store
from lorsa_utils.config import Profile, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.view import figures

TESTED_VERSIONS = {"torch": ((2, 8), (3,)), "transformers": ((5,), (6,))}
"""Package to the first tested version and the first untested one."""

VERSIONS = ("kit", "python", "torch", "transformers", "device")
"""Parts of `provenance` in a figure's record, besides the commit."""


# ---- provenance


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Refuse untested versions of torch and transformers.

    Raises:
        UserError: names the package and the command that repairs it.
    """
    for package, (first, end) in TESTED_VERSIONS.items():
        version = metadata.version(package) if installed is None else installed[package]
        release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if not first <= release < end:
            low, high = (".".join(map(str, bound)) for bound in (first, end))
            raise UserError(
                f"{package} {version} is outside the tested range; run: "
                f'pip install -c constraints.txt "{package}>={low},<{high}"'
            )


@functools.cache
def git_commit() -> str | None:
    """Commit of this package's checkout, with `+` when files differ from it; None without one."""
    root = store.CHECKOUT

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = git("rev-parse", "--short=10", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def device_name() -> str:
    """Human-readable name of the default device."""
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def provenance() -> dict[str, str]:
    """Versions, commit and device of this process."""
    return {
        "kit": __version__,
        "commit": git_commit() or "none",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "device": device_name(),
    }


# ---- stages


def stage(folder: str | Path, name: str, key: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
    """Do a costly step once: `make` fills the folder `<folder>/<name>-<hash of key>`.

    `key` is all that the result depends on, as JSON values. stage.json, written last, marks a complete stage and lists
    its files; when one is missing the stage is rebuilt. `make` gets the folder as it is, to resume what a killed run
    left.
    """
    full_key = {"kit": __version__, "stage": name, **key}
    target = Path(folder) / f"{name}-{store.sha256_json(full_key)[:8]}"
    marker = target / "stage.json"
    if marker.is_file():
        files = store.read_json(marker)["files"]
        if all((target / file).is_file() for file in files):
            return target
        marker.unlink()
    store.require_writable(target)
    make(target)
    made = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    store.write_json(marker, {"key": full_key, "files": made})
    return target


# ---- expected values


@dataclass(frozen=True)
class Check:
    """One recorded value (None if missing) against what is expected of it."""

    key: str
    value: Any
    expected: str
    """Human-readable; empty when nothing is expected."""
    passed: bool | None
    """None when nothing is expected."""

    @property
    def word(self) -> str:
        """PASS, FAIL or a dash."""
        return {True: "PASS", False: "FAIL", None: "-"}[self.passed]


def expected_values(name: str, section: str) -> dict[str, dict[str, Any]]:
    """A section of `data/expected/<name>.json`: `<profile>`, or `<profile>_checkpoint` for the checkpoint alone."""
    file = store.data_dir() / "expected" / f"{name}.json"
    return dict(store.read_json(file).get(section, {})) if file.is_file() else {}


def check_values(values: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Compare values with expectations {min}, {max} or {value, tolerance}, each with an optional note."""
    checks = []
    for key in [*values, *(key for key in expected if key not in values)]:
        rule = expected.get(key)
        value = values.get(key)
        passed = None if rule is None else key in values and _meets(value, rule, key)
        checks.append(Check(key, value, "" if rule is None else _describe(rule), passed))
    return checks


def _meets(value: Any, rule: Mapping[str, Any], key: str) -> bool:
    if not set(rule) & {"min", "max", "value"}:
        raise UserError(f"The expected value of {key!r} has neither min, max nor value; repair it in data/expected.")
    if not isinstance(value, int | float):
        return "value" in rule and value == rule["value"]
    within = (
        abs(value - rule["value"]) <= rule.get("tolerance", 0)
        if isinstance(rule.get("value"), int | float)
        else "value" not in rule
    )
    return within and rule.get("min", -math.inf) <= value <= rule.get("max", math.inf)


def _describe(rule: Mapping[str, Any]) -> str:
    parts = []
    if "value" in rule:
        parts.append(f"{rule['value']}" + (f" ± {rule['tolerance']}" if "tolerance" in rule else ""))
    parts += [f"at least {rule['min']}"] if "min" in rule else []
    parts += [f"at most {rule['max']}"] if "max" in rule else []
    return ", ".join(parts) + (f" ({rule['note']})" if rule.get("note") else "")


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
        """Do a costly step once per run folder, for all notebooks that name it with the same key; see `stage`.

        When the source of the modules in `code` changes, it is rebuilt.
        """
        sources = {"code": [store.sha256_file(str(module.__file__)) for module in code]} if code else {}
        return stage(self.folder / "stages", name, {**key, **sources}, make)

    def title(self, text: str) -> str:
        """`text`, with a note if the run is scaled down."""
        return f"{text} ({self.profile.name} profile, scaled down)" if self.profile.is_scaled_down else text

    def show(
        self, figure: go.Figure, label: str, caption: str, data: pd.DataFrame | None = None, **facts: Any
    ) -> figures.SavedFigure:
        """Save a figure under `<folder>/figures/` and display it: interactive in Jupyter, as a static image elsewhere.

        The title gets the note of a scaled-down run. `label` is the file name, starting with the paper item, such as
        `P4_layer_fvu`; `data` the numbers for the CSV, by default the figure's own. `facts` are added to the figure's
        record, where `model`, `layer` and `tokens` are the profile's unless given (None where they do not apply;
        without a model nothing is scaled down).
        """
        figure = go.Figure(figure)
        text = figure.layout.title.text or label
        about = self.about | facts
        # A figure without a language model has the same size in every profile.
        said = "scaled down" in text or about["model"] is None
        figure.update_layout(title_text=_wrap(text if said else self.title(text)))
        saved = figures.save_figure(figure, label, self.folder / "figures", data, caption)
        facts_of = provenance()
        record = {"label": label, "caption": caption, "notebook": self.name, "profile": self.profile.name, **about}
        record |= {"seed": self.seed, "commit": git_commit(), "versions": {key: facts_of[key] for key in VERSIONS}}
        store.write_json(saved.html.with_suffix(".json"), {key: _plain(value, key) for key, value in record.items()})
        _display(figure, saved, f"{label}. {caption}")
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
        rows = [(check.key, check.value, check.expected, check.word) for check in checks]
        table = pd.DataFrame(rows, columns=["key", "value", "expected", "result"])
        failed = [check for check in checks if check.passed is False]
        if failed:
            print(table.to_string(index=False))
            missed = "; ".join(f"{check.key} is {check.value}, expected {check.expected}" for check in failed)
            raise AssertionError(f"{self.name} ({section}): {missed}")
        return table


def start(name: str, profile: str, run_dir: str | Path = "", seed: int = 0) -> Context:
    """Begin a notebook: check versions, say where numbers come from, forget its earlier results.

    `profile` is `smoke`, `laptop`, `paper` or a preset. Where its model's weights are gated or out of reach, a banner
    says so and the run continues with the embedded model in the sizes of the laptop profile. `run_dir` is
    data/runs/<profile> when empty. Everything random in the notebook derives from `seed`.

    Raises:
        UserError: torch or transformers is outside the tested range, the profile does not exist or the folder cannot be
            written.
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
    """The laptop's profile and the reason when the model's weights are gated or out of reach."""
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
    file = Path(folder) / BANNERS_FILE
    return sorted(set(store.read_json(file).values())) if file.is_file() else []


def profile_of_run(folder: str | Path, profile: str) -> str:
    """The profile that a run's numbers are really of: `laptop` where a banner says its model was out of reach."""
    return "laptop" if banners(folder) else profile


def _show_banner(folder: Path, name: str, banner: str | None) -> None:
    file = folder / BANNERS_FILE
    kept = dict(store.read_json(file)) if file.is_file() else {}
    if kept.pop(name, None) is not None or banner:
        store.write_json(file, kept | ({name: banner} if banner else {}))
    if not banner:
        return
    import html

    style = "border: 2px solid #b45309; background: #fef3c7; color: #451a03; padding: 0.6em 1em; font-weight: bold"
    if not _display_bundle(
        {"text/plain": banner, "text/html": f'<div role="alert" style="{style}">{html.escape(banner)}</div>'}
    ):
        print(banner)


# ---- results


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All recorded values: notebook to key to value."""
    file = Path(folder) / "results.json"
    return dict(store.read_json(file)) if file.is_file() else {}


@contextlib.contextmanager
def changed_json(file: Path) -> Iterator[dict[str, Any]]:
    """Content of a file to change; locked, because notebooks may run side by side in one folder."""
    with FileLock(file.with_name(f".{file.name}.lock")):
        content = dict(store.read_json(file)) if file.is_file() else {}
        yield content
        store.write_json(file, content)


def _plain(value: Any, key: str) -> Any:
    """A JSON value from Python, numpy or torch."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}, which is no result; look for the step that made it.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{key} is a {type(value).__name__}; record a number, a text or a list of them.")


def _wrap(title: str) -> str:
    import textwrap

    return "<br>".join(textwrap.wrap(title.replace("<br>", " "), 68))


def _display(figure: go.Figure, saved: figures.SavedFigure, text: str) -> None:
    bundle: dict[str, Any] = {"text/plain": text, "application/vnd.plotly.v1+json": json.loads(figure.to_json())}
    if saved.png is not None:
        import base64

        bundle["image/png"] = base64.b64encode(saved.png.read_bytes()).decode()
    _display_bundle(bundle)


def _display_bundle(bundle: Mapping[str, Any]) -> bool:
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
