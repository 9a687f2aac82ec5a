"""The `lorsa` command: the stages of the notebooks, one by one.

A function here declares a command's options; the function of the same name in `commands` does the work and returns a
dict, the one thing on stdout with `--json`. Progress, warnings and errors (one sentence) go to stderr.

`commands`, and torch with it, is loaded only when a command runs, so that `lorsa --help` answers at once.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand
from typer.main import get_command
from typing_extensions import override

from lorsa_utils import __version__
from lorsa_utils.config import TrainConfig, get_preset
from lorsa_utils.exceptions import UserError

INTERRUPTED = {
    "train": "Stopped; the state is saved, run the same command with --resume to go on.",
    "cache": "Stopped; run the same command again, it goes on where it was.",
    "autointerp": "Stopped; answers so far are kept, run the same command again.",
    "reproduce": "Stopped; run the same command again, finished notebooks and stages are kept.",
}
OWN_OPTIONS = ("tokens", "seed", "freeze_qk", "init", "batch_size")
"""Fields of TrainConfig whose options `train` declares itself."""


# ---- running


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (bad input), 2 (bad usage) or 130 (interrupted)."""
    try:
        return int(get_command(app).main(argv, "lorsa", standalone_mode=False) or 0)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "lorsa"
        sentence = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")  # pydantic's
        print(f"{path}: {sentence}; see `{path} --help`.", file=sys.stderr)
        return error.exit_code


def _answer(name: str, function: str, values: Mapping[str, Any], as_json: bool) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from lorsa_utils.kit import commands

            answer = getattr(commands, function)(SimpleNamespace(**values))
        code, lines = answer.pop("exit_code", 0), answer.pop("lines", None)
        if commands.IS_FIRST_PROCESS:
            print(json.dumps(answer, allow_nan=False) if as_json else _readable(lines or answer), flush=True)
        return int(code)
    except KeyboardInterrupt:  # which leaves a progress bar behind on the line
        print(f"\n{INTERRUPTED.get(name, 'Stopped.')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone; stay silent at exit too
        return 1
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        print(f"lorsa: {sentence}", file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str | None:
    """What an error means to a user; None for a fault of the kit."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return "The memory is full; use a smaller --batch-size, fewer heads or fewer layers."
    if isinstance(error, OSError):
        place = f" {error.filename}" if error.filename else ""
        return f"Cannot read or write{place} ({error.strerror or error}); check the path and its permissions."
    return None


def _readable(answer: Mapping[str, Any], indent: str = "") -> str:
    width = max(map(len, answer), default=0)
    lines = []
    for key, value in answer.items():
        if isinstance(value, Mapping | list) and not value:
            lines.append(f"{indent}{key}  none")
        elif isinstance(value, Mapping):
            lines += [f"{indent}{key}", _readable(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{key}", *(f"{indent}  {_shown(item)}" for item in value)]
        else:
            lines.append(f"{indent}{key:<{width}}  {_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(_shown(item) for item in value.values() if item is not None)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- declaring

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)


class Command(TyperCommand):
    """Takes options of several values, such as `--text a.txt b.txt`."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        words: list[str] = []
        current = None
        for word, after in zip(args, [*args[1:], "-"], strict=False):
            if not word.startswith("-"):
                words += [current, word] if current else [word]
                continue
            current = word if word in several else None
            if current and after.startswith("-"):
                ctx.fail(f"Option {current!r} needs at least one value")
            words += [] if current else [word]
        return super().parse_args(ctx, words)


def command(name: str, *more: inspect.Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command by its options; the function of the same name in `commands` does the work."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        def run(json: bool, **values: Any) -> int:
            return _answer(name, function.__name__, values, json)

        options = inspect.signature(function, eval_str=True).parameters.values()
        run.__signature__ = inspect.Signature([*options, *more, AS_JSON])  # type: ignore[attr-defined]
        app.command(name, cls=Command, help=function.__doc__, short_help=function.__doc__)(run)  # short: not cut off
        return function

    return declare


def _settings() -> list[inspect.Parameter]:
    types = get_type_hints(TrainConfig)
    return [
        _parameter(item.name, item.default, types[item.name], typer.Option(metavar="X", help=item.metadata["help"]))
        for item in fields(TrainConfig)
        if item.name not in OWN_OPTIONS
    ]


def _parameter(name: str, default: Any, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# ---- values


def _count(text: str | int) -> int:
    try:
        value = int(str(text).replace("_", "").replace(",", ""))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error
    if value < 1:
        raise typer.BadParameter(f"must be at least 1, not {value}")
    return value


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"numbers separated by commas, such as 9,17, not {text!r}") from error


def _layers(text: str) -> list[int]:
    return sorted(set(_numbers(text)))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _prices(text: str) -> tuple[float, float]:
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"two prices, such as 0.15,0.60, not {text!r}") from error
    return read, written


def _version(asked: bool) -> None:
    if asked:
        print(f"lorsa {__version__}")
        raise typer.Exit


def _fill_in(context: typer.Context, preset: str | None) -> str | None:
    """Give `lorsa train` a preset's defaults, except the text, left to `commands.train` as --cache takes its place."""
    if preset:
        names = ("model", "n_heads", "n_qk", "k", "context", "batch_size")
        chosen = get_preset(preset)
        context.default_map = {name: getattr(chosen, name) for name in names} | {"tokens": chosen.train_tokens}
    return preset


# ---- options of several commands


def _value(metavar: str, help: str, parser: Callable[[str], Any] | None = None) -> Any:
    return typer.Option(metavar=metavar, help=help, parser=parser)


def _number(help: str, metavar: str = "N") -> Any:
    return typer.Option(metavar=metavar, help=help, parser=_count)


def _choice(help: str, **more: Any) -> Any:
    return typer.Option(help=help, **more)


def _flag(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, **more)


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help)


AS_JSON = _parameter(
    "json", False, bool, _flag("--json", "Print one JSON object on stdout, everything else on stderr.")
)
Profile = Literal["smoke", "laptop", "paper", "pythia-160m", "llama-3.1-8b", "qwen3-1.7b"]
Preset = Literal["pythia-160m", "llama-3.1-8b", "qwen3-1.7b"]

Run = Annotated[str, _argument("DIR", "Run folder of `lorsa train`.")]
Model = Annotated[str, _value("M", "smollm2 (embedded), a Hub id, a local folder or a .gguf file.")]
ModelOfRun = Annotated[str | None, _value("M", "Where the run's model is now, when it moved.")]
Text = Annotated[list[str] | None, _value("FILE...", "Text files or folders in place of the embedded text.")]
TextOfRun = Annotated[
    list[str] | None, _value("FILE...", "Text files or folders; without, the held-out part of the run's own text.")
]
Dataset = Annotated[str | None, _value("HF_ID", "Hugging Face dataset in place of the embedded text.")]
Context = Annotated[int, _number("Tokens in a sequence, BOS included.")]
Bos = Annotated[Literal["auto", "prepend", "none"], _choice("BOS in front of every sequence.")]
HeldOut = Annotated[int, _number("Tokens to measure on.")]
Tokens = Annotated[int, _number("At most N tokens of text.")]
Batch = Annotated[int, _number("Sequences in one model pass.")]
Step = Annotated[int, _number("Sequences in one step.")]
Device = Annotated[str, _value("D", "auto, cpu or cuda.")]
Seed = Annotated[int, _value("S", "Seed of all random draws.")]
StartSeed = Annotated[int, _value("S", "Order of the text, and start of the module.")]
Size = Annotated[Profile, _choice("Size of the run.")]
RunDir = Annotated[str | None, _value("DIR", "Where results are; without, data/runs/PROFILE.")]


# ---- commands


@app.callback()
def _lorsa(
    version: Annotated[bool, _flag("--version", "Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Train and measure low-rank sparse attention (Lorsa) layers on a language model."""


@command("doctor")
def doctor(
    profile: Annotated[Profile | None, _choice("Estimate time, disk and memory of this profile.")] = None,
    preset: Annotated[
        Preset | None, _choice("Estimate hours, disk and memory of training all layers of this preset.")
    ] = None,
) -> None:
    """Show versions, device and what is missing; estimate a profile."""


@command("fetch")
def fetch(force: Annotated[bool, _flag("--force", "Rebuild it even if it is there.")] = False) -> None:
    """Download and convert the embedded model (SmolLM2-135M-Instruct)."""


@command("cache")
def cache(
    layers: Annotated[Sequence[int], _value("9,17", "Layers to cache, in one pass.", _layers)],
    tokens: Annotated[int, _number("Training tokens.")],
    out: Annotated[str, _value("DIR", "Cache folder.")],
    model: Model = "smollm2",
    text: Text = None,
    dataset: Dataset = None,
    context: Context = 256,
    bos: Bos = "auto",
    held_out_tokens: HeldOut = 100_000,
    seed: StartSeed = 0,
    batch_size: Step = 4,
    device: Device = "auto",
    dtype: Annotated[Literal["bfloat16", "float32", "float16"], _choice("Of the activations on disk.")] = "bfloat16",
) -> None:
    """Write an activation cache."""


@command("train", *_settings())
def train(
    layer: Annotated[Sequence[int], _value("L", "Layer; several (9,17) train together into OUT/layer_L.", _layers)],
    out: Annotated[str, _value("DIR", "Run folder.")],
    preset: Annotated[
        Preset | None,
        _choice(
            "Model, text, shape and budget of the paper's suites; other options win.", is_eager=True, callback=_fill_in
        ),
    ] = None,
    kind: Annotated[Literal["lorsa", "sae", "transcoder"], _choice("What to train.")] = "lorsa",
    n_heads: Annotated[int | None, _number("Lorsa heads, or features of an SAE; without, 8 x d_model.", "H")] = None,
    n_qk: Annotated[int | None, _number("QK groups; without, as many as n_heads / d_head.", "Q")] = None,
    k: Annotated[int, _number("Heads kept for each token.", "K")] = 64,
    model: Model = "smollm2",
    text: Text = None,
    dataset: Dataset = None,
    cache: Annotated[
        str | None, _value("DIR", "Read this activation cache; without, activations are computed on the way.")
    ] = None,
    context: Context = 256,
    bos: Bos = "auto",
    tokens: Annotated[int, _number("Training tokens; a shorter text is read again.")] = 250_000,
    held_out_tokens: HeldOut = 100_000,
    seed: StartSeed = 0,
    batch_size: Step = 4,
    device: Device = "auto",
    init: Annotated[Literal["mhsa", "random"], _choice("Start of a Lorsa.")] = "mhsa",
    freeze_qk: Annotated[bool, _flag("--freeze-qk", "Leave queries and keys at the start.")] = False,
    resume: Annotated[bool, _flag("--resume", "Go on with the run in OUT.")] = False,
    spread: Annotated[
        Literal["tokens", "layers"], _choice("What the processes of torchrun share: each batch, or the layers.")
    ] = "tokens",
    logger: Annotated[Literal["jsonl", "tensorboard", "wandb"], _choice("Log beside metrics.jsonl.")] = "jsonl",
) -> None:
    """Train one Lorsa, SAE or transcoder and measure it on held-out text."""


@command("eval")
def evaluate(
    folder: Run,
    text: TextOfRun = None,
    tokens: Tokens = 100_000,
    model: ModelOfRun = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Measure a trained module: reconstruction, and the model's loss with it in the layer's place."""


@command("heads")
def heads(
    folder: Run,
    out: Annotated[str, _value("TABLE.parquet", "The table.")],
    text: TextOfRun = None,
    tokens: Tokens = 50_000,
    removed: Annotated[int, _value("N", "Heads of each family whose removal from the model is measured.")] = 3,
    seed: Seed = 0,
    model: ModelOfRun = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Find out what the heads of a trained Lorsa do; one row per head, as Parquet."""


@command("show")
def show(
    folder: Run,
    head: Annotated[Sequence[int], _value("I", "Which head; several: 12,1956.", _numbers)],
    out: Annotated[str, _value("F.html", "The page; a folder for several heads.")],
    table: Annotated[
        str | None,
        _value("TABLE.parquet", "Of `lorsa heads`, for names and scores; without, DIR/heads.parquet if it is there."),
    ] = None,
    explanations: Annotated[
        str | None, _value("SCORES.parquet", "Of `lorsa autointerp`, for explanations and their detection scores.")
    ] = None,
    sae: Annotated[
        str | None,
        _value("DIR", "Run folder of an SAE of the same layer, for the features nearest to what the head writes."),
    ] = None,
    transcoder: Annotated[
        str | None, _value("DIR", "Run folder of a transcoder of the same layer, for those nearest to what it reads.")
    ] = None,
    text: TextOfRun = None,
    tokens: Tokens = 20_000,
    seed: Seed = 0,
    model: ModelOfRun = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Write a page for one head, or for several in one pass over the text; it opens from the disk, offline."""


@command("circuit")
def circuit(
    folders: Annotated[list[str] | None, _argument("DIR", "Run folders of `lorsa train`, one for each layer.")] = None,
    nodes: Annotated[Literal["lorsa", "sae", "mhsa"], _choice("What the layers are decomposed into.")] = "lorsa",
    task: Annotated[
        str, _value("T", "induction, indirect_object, successor, greater_than, agreement, ...")
    ] = "induction",
    prompts: Annotated[
        str | None, _value("FILE", "Own pairs in place of the task's: JSON lines with clean, corrupted, answer, wrong.")
    ] = None,
    layers: Annotated[
        Sequence[int] | None, _value("9,17", "Layers of --nodes mhsa, when no DIR names them.", _layers)
    ] = None,
    metric: Annotated[
        Literal["logit_difference", "loss", "kl"], _choice("What the circuit must keep up.")
    ] = "logit_difference",
    ablation: Annotated[Literal["resample", "mean", "zero"], _choice("What removed nodes write instead.")] = "resample",
    pairs: Annotated[int, _number("Pairs of prompts; half of them rank nodes, half measure.")] = 32,
    graph: Annotated[
        str | None, _value("OUT.json", "Trace the first prompt and write its graph for Neuronpedia's viewer.")
    ] = None,
    traced: Annotated[int, _number("Nodes of the graph whose inputs are traced.")] = 64,
    out: Annotated[str | None, _value("CURVES.csv", "Write the curves as a table as well.")] = None,
    seed: Seed = 0,
    model: Annotated[
        str | None, _value("M", "Where the runs' model is now, when it moved; the model itself, when no DIR is given.")
    ] = None,
    batch_size: Annotated[int, _number("Prompts in one model pass.")] = 32,
    device: Device = "auto",
) -> None:
    """Find the nodes that a behaviour needs, and measure how much of it they carry."""


@command("autointerp")
def autointerp(
    folders: Annotated[
        list[str], _argument("DIR", "Run folders of `lorsa train`; a Lorsa and an SAE of one layer are compared.")
    ],
    out: Annotated[str, _value("DIR", "Scores, tests and answers; the same folder again goes on there.")],
    backend: Annotated[Literal["rules", "local", "openai", "replay"], _choice("Who explains and judges.")] = "rules",
    units: Annotated[int, _number("Units of each module, drawn at random.")] = 100,
    judge_model: Annotated[
        str | None, _value("M", "local: as --model (without, the run's own model); openai: the server's name for it.")
    ] = None,
    answers: Annotated[str | None, _value("FILE", "replay: answers.jsonl of an earlier run.")] = None,
    scorers: Annotated[Sequence[str], _value("S", "Some of these.", _names)] = "detection,fuzzing,simulation",
    yes: Annotated[bool, _flag("--yes", "openai: do not ask before the first question.")] = False,
    prices: Annotated[
        Any, _value("IN,OUT", "openai: prices of a million tokens to read and to write.", _prices)
    ] = None,
    concurrency: Annotated[int, _number("openai: questions at a time.")] = 4,
    text: TextOfRun = None,
    tokens: Tokens = 50_000,
    seed: Seed = 0,
    model: ModelOfRun = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Explain units of trained modules and score the explanations."""


@command("import")
def import_(
    source: Annotated[
        str, _argument("SRC", "Folder, <repo>:<folder> on the Hugging Face Hub, or a small checkpoint of this kit.")
    ],
    folder: Annotated[str, _argument("DIR", "Run folder to make.")],
    model: Annotated[
        str | None, _value("M", "Language model it is for: every reading of the weights is measured, the best taken.")
    ] = None,
    layer: Annotated[int | None, _value("L", "Attention layer; without, the one that the checkpoint names.")] = None,
    text: Text = None,
    dataset: Dataset = None,
    tokens: Tokens = 20_000,
    device: Device = "auto",
) -> None:
    """Make a run folder from published Lorsa weights (Language-Model-SAEs or OpenMOSS/Lorsa)."""


@command("export")
def export(
    folder: Run,
    target: Annotated[str, _argument("DST", "Folder to make.")],
    format: Annotated[
        Literal["llamascopium", "small"], _choice("small: a run folder of 40 % the size.")
    ] = "llamascopium",
    push: Annotated[str | None, _value("REPO_ID", "Upload DST to this repository on the Hugging Face Hub.")] = None,
    path_in_repo: Annotated[str | None, _value("FOLDER", "Folder in that repository; without, its root.")] = None,
    private: Annotated[bool, _flag("--private", "A new repository is visible to its owner only.")] = False,
) -> None:
    """Write a trained Lorsa for Language-Model-SAEs (Llamascopium), with a model card."""


@command("bench")
def bench(
    shape: Annotated[Sequence[str], _value("S", "A, B, pythia, pythia-1024, llama; several: A,B.", _names)] = "A,B",
    backend: Annotated[
        Sequence[str] | None, _value("NAME", "Only these: torch, triton, plain, plain-compiled.", _names)
    ] = None,
    rounds: Annotated[int, _number("Timed steps of each backend.")] = 15,
    device: Device = "auto",
    out: Annotated[str | None, _value("CSV", "Where rows are added; without, data/benchmarks.csv.")] = None,
) -> None:
    """Time training steps against the hardware's floor and plain PyTorch; append rows to a CSV."""


@command("reproduce")
def reproduce(
    profile: Size = "laptop",
    only: Annotated[Sequence[str] | None, _value("02,04", "Numbers or names of notebooks.", _names)] = None,
    force: Annotated[bool, _flag("--force", "Run also what is up to date.")] = False,
    run_dir: RunDir = None,
) -> None:
    """Run the notebooks in order and write index.html."""


@command("claims")
def claims(
    profile: Size = "laptop",
    run_dir: RunDir = None,
    publish: Annotated[
        bool, _flag("--publish", "Keep the numbers in data/paper/results.csv and write README's table.")
    ] = False,
) -> None:
    """Print the paper's claims beside a run's numbers and verdicts."""
