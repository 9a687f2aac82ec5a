"""The `lorsa` command: the stages of the notebooks, one by one.

Every subcommand is a function from parsed arguments to a dict. With `--json` that dict is the one thing on stdout;
progress and warnings go to stderr. Bad input ends in one sentence on stderr and exit code 1, bad usage in exit code 2.

torch and all that needs it are imported inside the functions, so that `lorsa --help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorsa_utils import __version__
from lorsa_utils.exceptions import UserError

if TYPE_CHECKING:
    from lorsa_utils.activations import ActivationSource
    from lorsa_utils.circuits.nodes import SparseModel
    from lorsa_utils.config import LorsaConfig, SAEConfig
    from lorsa_utils.heads.prompts import Vocabulary
    from lorsa_utils.heads.tasks import Task
    from lorsa_utils.models import AttentionSite, LanguageModel
    from lorsa_utils.text import Corpus, Sequences
    from lorsa_utils.train import RunSpec, World

PRESET_NAMES = ("pythia-160m", "llama-3.1-8b", "qwen3-1.7b")
PROFILE_NAMES = ("smoke", "laptop", "paper", *PRESET_NAMES)
KINDS = ("lorsa", "sae", "transcoder")
FEW_NODES = 64  # so many nodes of a circuit are ranked by removing each, more by gradients
# These fields of TrainConfig have options of their own.
IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun started
OWN_OPTIONS = ("tokens", "seed", "freeze_qk", "init", "batch_size")


# ---- parser


def build_parser(train_defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of the `lorsa` command, with other defaults for `lorsa train` where a preset brings them."""
    parser = argparse.ArgumentParser(
        prog="lorsa", description="Train and measure low-rank sparse attention (Lorsa) layers on a language model."
    )
    parser.add_argument("--version", action="version", version=f"lorsa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("doctor", doctor, "Tell versions, device and what is missing; estimate a profile.")
    sub.add_argument("--profile", choices=PROFILE_NAMES, help="estimate time, disk and memory of this profile")
    sub.add_argument(
        "--preset", choices=PRESET_NAMES, help="estimate hours, disk and memory of training all layers of this preset"
    )

    sub = command("fetch", fetch, "Download and convert the embedded model (SmolLM2-135M-Instruct).")
    sub.add_argument("--force", action="store_true", help="make it again even if it is there")

    _cache_options(command("cache", cache, "Write an activation cache."))
    sub = command("train", train, "Train one Lorsa, SAE or transcoder and measure it on held-out text.")
    _train_options(sub)
    sub.set_defaults(**(train_defaults or {}))

    sub = command(
        "eval", evaluate, "Measure a trained module: reconstruction, and the model's loss with it in the layer's place."
    )
    sub.add_argument("folder", metavar="DIR", help="run folder of `lorsa train`")
    sub.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files or folders; without, the held-out part of the run's own text",
    )
    sub.add_argument("--tokens", type=_count, default=100_000, metavar="N", help="at most so many tokens")
    sub.add_argument("--model", metavar="M", help="where the run's model is now, when it moved")
    sub.add_argument("--batch-size", type=_count, default=8, help="sequences in one model pass")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")

    sub = command("heads", heads, "Find out what the heads of a trained Lorsa do; one row a head, as Parquet.")
    sub.add_argument("folder", metavar="DIR", help="run folder of `lorsa train`")
    sub.add_argument("--out", required=True, metavar="TABLE.parquet", help="the table")
    sub.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files or folders; without, the held-out part of the run's own text",
    )
    sub.add_argument("--tokens", type=_count, default=50_000, metavar="N", help="at most so many tokens of text")
    sub.add_argument(
        "--removed",
        type=int,
        default=3,
        metavar="N",
        help="heads of each family whose removal from the model is measured",
    )
    sub.add_argument("--seed", type=int, default=0, help="of prompts, nulls and shuffles")
    sub.add_argument("--model", metavar="M", help="where the run's model is now, when it moved")
    sub.add_argument("--batch-size", type=_count, default=8, help="sequences in one model pass")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")

    sub = command(
        "show",
        show,
        "Write a page for one head, or for several in one pass over the text; it opens from the disk, offline.",
    )
    sub.add_argument("folder", metavar="DIR", help="run folder of `lorsa train`")
    sub.add_argument("--head", type=_numbers, required=True, metavar="I", help="which head; several: 12,1956")
    sub.add_argument("--out", required=True, metavar="F.html", help="the page; a folder for several heads")
    sub.add_argument(
        "--table",
        metavar="TABLE.parquet",
        help="of `lorsa heads`, for names and scores; without, DIR/heads.parquet if it is there",
    )
    sub.add_argument(
        "--explanations",
        metavar="SCORES.parquet",
        help="of `lorsa autointerp`, for explanations and their detection scores",
    )
    sub.add_argument(
        "--sae",
        metavar="DIR",
        help="run folder of an SAE of the same layer, for the features nearest to what the head writes",
    )
    sub.add_argument(
        "--transcoder",
        metavar="DIR",
        help="run folder of a transcoder of the same layer, for those nearest to what it reads",
    )
    sub.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files or folders; without, the held-out part of the run's own text",
    )
    sub.add_argument("--tokens", type=_count, default=20_000, metavar="N", help="at most so many tokens of text")
    sub.add_argument("--seed", type=int, default=0, help="of the order of the text and of random contexts")
    sub.add_argument("--model", metavar="M", help="where the run's model is now, when it moved")
    sub.add_argument("--batch-size", type=_count, default=8, help="sequences in one model pass")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")

    _circuit_options(
        command("circuit", circuit, "Find the nodes that a behaviour needs, and measure how much of it they carry.")
    )

    _autointerp_options(
        command("autointerp", autointerp, "Explain units of trained modules and score the explanations.")
    )

    sub = command(
        "import", import_, "Make a run folder from published Lorsa weights (Language-Model-SAEs or OpenMOSS/Lorsa)."
    )
    sub.add_argument(
        "source",
        metavar="SRC",
        help="folder, <repo>:<folder> on the Hugging Face Hub, or a small checkpoint of this kit",
    )
    sub.add_argument("folder", metavar="DIR", help="run folder to make")
    sub.add_argument(
        "--model",
        metavar="M",
        help="language model it is for: every reading of the weights is measured, the best taken",
    )
    sub.add_argument(
        "--layer", type=int, metavar="L", help="attention layer; without, the one that the checkpoint names"
    )
    sub.add_argument(
        "--text", nargs="+", metavar="FILE", help="text files or folders to measure on in place of the embedded text"
    )
    sub.add_argument("--dataset", metavar="HF_ID", help="Hugging Face dataset in place of the embedded text")
    sub.add_argument("--tokens", type=_count, default=20_000, metavar="N", help="at most so many tokens of it")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")

    sub = command("export", export, "Write a trained Lorsa for Language-Model-SAEs (Llamascopium), with a model card.")
    sub.add_argument("folder", metavar="DIR", help="run folder of `lorsa train`")
    sub.add_argument("target", metavar="DST", help="folder to make")
    sub.add_argument(
        "--format",
        choices=("llamascopium", "small"),
        default="llamascopium",
        help="small: a run folder of 40 %% the size",
    )
    sub.add_argument("--push", metavar="REPO_ID", help="upload DST to this repository on the Hugging Face Hub")
    sub.add_argument("--path-in-repo", metavar="FOLDER", help="folder in that repository; without, its root")
    sub.add_argument("--private", action="store_true", help="a new repository is visible to its owner only")

    sub = command(
        "bench", bench, "Time training steps against the hardware's floor and plain PyTorch; append rows to a CSV."
    )
    sub.add_argument(
        "--shape", type=_names, default=["A", "B"], metavar="S", help="A, B, pythia, pythia-1024, llama; several: A,B"
    )
    sub.add_argument("--backend", type=_names, metavar="NAME", help="only these: torch, triton, plain, plain-compiled")
    sub.add_argument("--rounds", type=_count, default=15, metavar="N", help="timed steps of each backend")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--out", metavar="CSV", help="where rows are added; without, data/benchmarks.csv")

    sub = command("reproduce", reproduce, "Run the notebooks in order and write index.html.")
    sub.add_argument("--profile", choices=PROFILE_NAMES, default="laptop", help="size of the run")
    sub.add_argument("--only", type=_names, metavar="02,04", help="numbers or names of notebooks")
    sub.add_argument("--force", action="store_true", help="run also what is up to date")
    sub.add_argument("--run-dir", metavar="DIR", help="where results go; without, data/runs/PROFILE")

    sub = command("claims", claims, "Print the paper's claims beside a run's numbers and verdicts.")
    sub.add_argument("--profile", choices=PROFILE_NAMES, default="laptop", help="size of the run")
    sub.add_argument("--run-dir", metavar="DIR", help="where results are; without, data/runs/PROFILE")
    sub.add_argument(
        "--publish", action="store_true", help="keep the numbers in data/paper/results.csv and write README's table"
    )
    return parser


def _text_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model", default="smollm2", metavar="M", help="smollm2 (embedded), a Hub id, a local folder or a .gguf file"
    )
    sub.add_argument("--text", nargs="+", metavar="FILE", help="text files or folders in place of the embedded text")
    sub.add_argument("--dataset", metavar="HF_ID", help="Hugging Face dataset in place of the embedded text")
    sub.add_argument("--context", type=_count, default=256, metavar="N", help="tokens in a sequence, BOS included")
    sub.add_argument(
        "--bos", choices=("auto", "prepend", "none"), default="auto", help="BOS in front of every sequence"
    )
    sub.add_argument("--held-out-tokens", type=_count, default=100_000, metavar="N", help="tokens to measure on")
    sub.add_argument("--seed", type=int, default=0, help="order of the text, and start of the module")
    sub.add_argument("--batch-size", type=_count, default=4, help="sequences in one step")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _cache_options(sub: argparse.ArgumentParser) -> None:
    _text_options(sub)
    sub.add_argument("--layers", type=_layers, required=True, metavar="9,17", help="layers to cache, in one pass")
    sub.add_argument("--tokens", type=_count, required=True, metavar="N", help="training tokens")
    sub.add_argument("--out", required=True, metavar="DIR", help="cache folder")
    sub.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="of the activations on disk"
    )


def _train_options(sub: argparse.ArgumentParser) -> None:
    _text_options(sub)
    sub.add_argument(
        "--layer",
        type=_layers,
        required=True,
        metavar="L",
        help="layer; several (9,17) train together into OUT/layer_L",
    )
    sub.add_argument(
        "--preset", choices=PRESET_NAMES, help="model, text, shape and budget of the paper's suites; other options win"
    )
    sub.add_argument("--kind", choices=KINDS, default="lorsa", help="what to train")
    sub.add_argument(
        "--n-heads", type=_count, metavar="H", help="Lorsa heads, or features of an SAE; without, 8 x d_model"
    )
    sub.add_argument("--n-qk", type=_count, metavar="Q", help="QK groups; without, as many as n_heads / d_head")
    sub.add_argument("--k", type=_count, default=64, metavar="K", help="heads kept for each token")
    sub.add_argument(
        "--tokens", type=_count, default=250_000, metavar="N", help="training tokens; a shorter text is read again"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="run folder")
    sub.add_argument(
        "--cache", metavar="DIR", help="read this activation cache; without, activations are computed on the way"
    )
    sub.add_argument("--init", choices=("mhsa", "random"), default="mhsa", help="start of a Lorsa")
    sub.add_argument("--freeze-qk", action="store_true", help="leave queries and keys at the start")
    sub.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    sub.add_argument(
        "--spread",
        choices=("tokens", "layers"),
        default="tokens",
        help="what the processes of torchrun share: each batch, or the layers",
    )
    sub.add_argument(
        "--logger", choices=("jsonl", "tensorboard", "wandb"), default="jsonl", help="log beside metrics.jsonl"
    )
    for name, kind, default, text in _config_fields("TrainConfig"):
        if name not in OWN_OPTIONS:
            option = f"--{name.replace('_', '-')}"
            # Without the option the attribute stays away, so that TrainConfig alone knows its defaults.
            sub.add_argument(
                option, type=kind, default=argparse.SUPPRESS, metavar="X", help=f"{text} (default: {default})"
            )


def _circuit_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folders", nargs="*", metavar="DIR", help="run folders of `lorsa train`, one for each layer")
    sub.add_argument(
        "--nodes", choices=("lorsa", "sae", "mhsa"), default="lorsa", help="what the layers are taken apart into"
    )
    sub.add_argument(
        "--task",
        default="induction",
        metavar="T",
        help="induction, indirect_object, successor, greater_than, agreement, ...",
    )
    sub.add_argument(
        "--prompts",
        metavar="FILE",
        help="own pairs in place of the task's: JSON lines with clean, corrupted, answer, wrong",
    )
    sub.add_argument("--layers", type=_layers, metavar="9,17", help="layers of --nodes mhsa, when no DIR names them")
    sub.add_argument(
        "--metric",
        choices=("logit_difference", "loss", "kl"),
        default="logit_difference",
        help="what the circuit must keep up",
    )
    sub.add_argument(
        "--ablation", choices=("resample", "mean", "zero"), default="resample", help="what removed nodes write instead"
    )
    sub.add_argument(
        "--pairs", type=_count, default=32, metavar="N", help="pairs of prompts; half of them rank nodes, half measure"
    )
    sub.add_argument(
        "--graph", metavar="OUT.json", help="trace the first prompt and write its graph for Neuronpedia's viewer"
    )
    sub.add_argument(
        "--traced", type=_count, default=64, metavar="N", help="nodes of the graph whose inputs are traced"
    )
    sub.add_argument("--out", metavar="CURVES.csv", help="write the curves as a table as well")
    sub.add_argument("--seed", type=int, default=0, help="of prompts and random sets")
    sub.add_argument(
        "--model",
        metavar="M",
        help="where the runs' model is now, when it moved; the model itself, when no DIR is given",
    )
    sub.add_argument("--batch-size", type=_count, default=32, help="prompts in one model pass")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _autointerp_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="run folders of `lorsa train`; a Lorsa and an SAE of one layer are compared",
    )
    sub.add_argument(
        "--backend", choices=("rules", "local", "openai", "replay"), default="rules", help="who explains and judges"
    )
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="scores, tests and answers; the same folder again goes on there"
    )
    sub.add_argument("--units", type=_count, default=100, metavar="N", help="units of each module, drawn at random")
    sub.add_argument(
        "--judge-model",
        metavar="M",
        help="local: as --model (without, the run's own model); openai: the server's name for it",
    )
    sub.add_argument("--answers", metavar="FILE", help="replay: answers.jsonl of an earlier run")
    sub.add_argument(
        "--scorers", type=_names, default=["detection", "fuzzing", "simulation"], metavar="S", help="some of these"
    )
    sub.add_argument("--yes", action="store_true", help="openai: do not ask before the first question")
    sub.add_argument(
        "--prices", type=_prices, metavar="IN,OUT", help="openai: prices of a million tokens to read and to write"
    )
    sub.add_argument("--concurrency", type=_count, default=4, metavar="N", help="openai: questions at a time")
    sub.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files or folders; without, the held-out part of the runs' own text",
    )
    sub.add_argument("--tokens", type=_count, default=50_000, metavar="N", help="at most so many tokens of text")
    sub.add_argument("--seed", type=int, default=0, help="of all draws")
    sub.add_argument("--model", metavar="M", help="where the runs' model is now, when it moved")
    sub.add_argument("--batch-size", type=_count, default=8, help="sequences in one model pass")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _prices(text: str) -> tuple[float, float]:
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"two prices, as 0.15,0.60, not {text!r}") from error
    return read, written


def _config_fields(class_name: str) -> list[tuple[str, Any, str, str]]:
    """Name, type, default and docstring of a config's fields, read from its source: importing it would import torch."""
    tree = ast.parse((Path(__file__).parents[1] / "config.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = []
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(after, ast.Expr):
            kind = {"int": int, "float": float}.get(ast.unparse(node.annotation), str)
            text = ast.literal_eval(after.value).replace("%", "%%")
            fields.append((ast.unparse(node.target), kind, ast.unparse(node.value), text))
    return fields


def _count(text: str) -> int:
    value = int(text.replace("_", "").replace(",", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _layers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"layers are numbers separated by commas, as 9,17, not {text!r}") from error


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"heads are numbers separated by commas, as 12,1956, not {text!r}") from error


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# ---- main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (bad input), 2 (bad usage), 130 (interrupted)."""
    try:
        arguments = build_parser().parse_args(argv)
        if getattr(arguments, "preset", None) and arguments.command == "train":
            arguments = build_parser(_preset_options(arguments)).parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return _answer(arguments)
    except KeyboardInterrupt:
        return _say(INTERRUPTED.get(arguments.command, "Stopped."), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; say nothing at exit either
        return 1


def _preset_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a preset fills in; its text only where no other is given."""
    from lorsa_utils.config import get_preset
    from lorsa_utils.kit.presets import train_options

    options = train_options(get_preset(arguments.preset))
    return options | ({"dataset": None} if arguments.text or arguments.cache else {})


INTERRUPTED = {
    "train": "Stopped; the state is saved, run the same command with --resume to go on.",
    "cache": "Stopped; run the same command again, it goes on where it was.",
    "autointerp": "Stopped; answers so far are kept, run the same command again.",
    "reproduce": "Stopped; run the same command again, finished notebooks and stages are kept.",
}


def _answer(arguments: argparse.Namespace) -> int:
    """Run the command, print its answer, and turn errors into sentences."""
    import torch

    from lorsa_utils.exceptions import UserError

    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = arguments.run(arguments)
    except UserError as error:
        return _say(str(error))
    except (MemoryError, torch.OutOfMemoryError):
        return _say("The memory is full; use a smaller --batch-size, fewer heads or fewer layers.")
    except BrokenPipeError:
        raise
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        return _say(f"Cannot read or write{place} ({error.strerror or error}); check the path and its permissions.")
    code = answer.pop("exit_code", 0)
    if IS_FIRST_PROCESS:
        print(json.dumps(answer, allow_nan=False) if arguments.json else _readable(answer), flush=True)
    return code


def _say(sentence: str, code: int = 1) -> int:
    # An interrupt leaves a progress bar behind on the line.
    print(f"lorsa: {sentence}" if code == 1 else f"\n{sentence}", file=sys.stderr)
    return code


def _note(text: str) -> None:
    if IS_FIRST_PROCESS:
        print(text, file=sys.stderr, flush=True)


def _readable(answer: Mapping[str, Any], indent: str = "") -> str:
    """A dict as aligned lines."""
    width = max((len(str(key)) for key in answer), default=0)
    lines = []
    for key, value in answer.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", _readable(value, indent + "  ")] if value else [f"{indent}{key}  none"]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [
                f"{indent}{key}",
                *(
                    f"{indent}  "
                    + "  ".join(
                        f"{item:.4g}" if isinstance(item, float) else str(item)
                        for item in row.values()
                        if item is not None
                    )
                    for row in value
                ),
            ]
        elif isinstance(value, list):
            lines += [f"{indent}{key}", *(f"{indent}  {item}" for item in value)] if value else [f"{indent}{key}  none"]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{key!s:<{width}}  {shown}")
    return "\n".join(lines)


# ---- text to tokens


def _corpus(text: Sequence[str] | None, dataset: str | None, n_tokens: int) -> tuple[Corpus, str | list[str]]:
    """The text that the flags ask for, and its name as it is saved with a run."""
    from lorsa_utils.text import load_corpus

    corpus = load_corpus(text, dataset, max_tokens=n_tokens)
    if text:
        return corpus, [str(Path(path).absolute()) for path in text]
    return corpus, dataset or "embedded"


def _splits(arguments: argparse.Namespace, model: LanguageModel) -> tuple[dict[str, Sequences], str | list[str]]:
    """`train` and, where there is text to hold out, `held_out` sequences."""
    from lorsa_utils.text import tokenize

    corpus, name = _corpus(arguments.text, arguments.dataset, arguments.tokens + arguments.held_out_tokens)
    splits = {}
    for split, documents, n_tokens in (
        ("train", corpus.train, arguments.tokens),
        ("held_out", corpus.held_out, arguments.held_out_tokens),
    ):
        if documents or split == "train":
            splits[split] = tokenize(
                documents,
                model.tokenizer,
                context=arguments.context,
                n_tokens=n_tokens,
                bos_policy=arguments.bos,
                seed=arguments.seed,
            )
    return splits, name


# ---- commands


def fetch(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa fetch`: the embedded model, checked by its hash."""
    from lorsa_utils import store
    from lorsa_utils.fetch import fetch_embedded_model

    folder = fetch_embedded_model(force=arguments.force)
    recorded = store.read_json(folder / "source.json")["safetensors_sha256"]
    found = store.sha256_file(folder / "model.safetensors")
    if found != recorded:
        raise UserError(
            f"{folder / 'model.safetensors'} is damaged (another SHA-256 than when it was made); run `lorsa fetch --force`."
        )
    return {"path": str(folder), "sha256": found}


def cache(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa cache`: activations of several layers on disk, from one pass."""
    from lorsa_utils import activations, store
    from lorsa_utils.models import load_model

    model = load_model(arguments.model, device=arguments.device)
    for layer in arguments.layers:
        model.site(layer)
    out = store.require_writable(arguments.out)
    splits, text = _splits(arguments, model)
    if sentence := splits["train"].shortfall:
        _note(sentence)
    before = _cached_tokens(out)
    began = time.perf_counter()
    activations.build_cache(
        model, splits, arguments.layers, out, dtype=arguments.dtype, batch_size=arguments.batch_size, text=text
    )
    seconds = time.perf_counter() - began
    manifest = store.read_json(out / "manifest.json")
    return {
        "path": str(out),
        "tokens": splits["train"].n_tokens,
        "held_out_tokens": splits["held_out"].n_tokens if "held_out" in splits else 0,
        "bytes": sum(shard["bytes"] for entry in manifest["splits"].values() for shard in entry["shards"]),
        "tokens_per_s": (_cached_tokens(out) - before) / seconds,
        "seconds": seconds,
    }


def _cached_tokens(folder: Path) -> int:
    """Tokens in the shards that are listed so far."""
    from lorsa_utils import store

    if not (folder / "manifest.json").is_file():
        return 0
    splits = store.read_json(folder / "manifest.json")["splits"]
    return sum(shard["n_tokens"] for entry in splits.values() for shard in entry["shards"])


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa train`: train on activations from disk or on the way, then measure on held-out text."""
    from lorsa_utils.train import World, join_world

    if arguments.cache and (arguments.text or arguments.dataset):
        raise UserError("A cache brings its own text; give either --cache or --text/--dataset.")
    arguments.folders = {layer: Path(arguments.out) / f"layer_{layer}" for layer in arguments.layer}
    if len(arguments.layer) == 1:
        arguments.folders = {arguments.layer[0]: Path(arguments.out)}
    with join_world() as world:
        if arguments.spread == "tokens":
            answers = _train_layers(arguments, world)
        else:
            if world.size > len(arguments.layer):
                raise UserError(f"{world.size} processes cannot share {len(arguments.layer)} layers; start fewer.")
            arguments.layer = arguments.layer[world.rank :: world.size]
            answers = world.gather(_train_layers(arguments, World()))
    if len(arguments.folders) == 1 and answers:
        return {"path": arguments.out, **answers[str(arguments.layer[0])]}
    return {"path": arguments.out, "layers": answers}


def _train_layers(arguments: argparse.Namespace, world: World) -> dict[str, dict[str, float]]:
    """Train and measure; what is measured, by layer. The first process measures, the others return nothing."""
    from lorsa_utils import metrics, store
    from lorsa_utils.models import load_model
    from lorsa_utils.train import make_logger, train_runs

    model = load_model(arguments.model, device=arguments.device)
    sites = {layer: model.site(layer) for layer in arguments.layer}
    specs = _run_specs(arguments, sites)
    for spec in specs:
        store.require_writable(spec.folder)
    source, held_out = _sources(arguments, model)
    _tell_cost(specs, source, sites, model, arguments.resume)
    before = _tokens_seen(specs[0].folder) if arguments.resume else 0
    logger = make_logger(arguments.logger, arguments.out) if world.rank == 0 else None
    began = time.perf_counter()
    runs = train_runs(specs, source, sites, device=model.device, resume=arguments.resume, logger=logger, world=world)
    seconds = time.perf_counter() - began
    if world.rank > 0:
        return {}
    modules = {run.spec.name: (run.spec.layer, run.finished_module()) for run in runs}
    measured = metrics.evaluate_activations(modules, held_out, arguments.batch_size)
    speed = {"tokens_per_s": (runs[0].tokens_seen - before) / seconds, "seconds": seconds}
    answers = {str(run.spec.layer): measured[run.spec.name] | speed for run in runs}
    for run in runs:
        store.write_json(run.spec.folder / "results.json", answers[str(run.spec.layer)])
    return answers


def _run_specs(arguments: argparse.Namespace, sites: Mapping[int, AttentionSite]) -> list[RunSpec]:
    """One run a layer, checked before any text is read."""
    from lorsa_utils.config import TrainConfig
    from lorsa_utils.train import RunSpec

    names = [name for name, *_ in _config_fields("TrainConfig")]
    settings = TrainConfig(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    return [
        RunSpec(f"{arguments.kind} {layer}", layer, _module_config(arguments, site), settings, arguments.folders[layer])
        for layer, site in sites.items()
    ]


def _module_config(arguments: argparse.Namespace, site: AttentionSite) -> LorsaConfig | SAEConfig:
    """Shape of the module; what was not asked for follows from the layer."""
    from lorsa_utils.config import SAEConfig
    from lorsa_utils.lorsa import Lorsa

    n_heads = arguments.n_heads or 8 * site.d_model
    if arguments.kind != "lorsa":
        return SAEConfig(d_model=site.d_model, n_features=n_heads, k=arguments.k, kind=arguments.kind)
    default = next(n for n in range(max(1, n_heads // site.d_head), 0, -1) if n_heads % n == 0)
    return Lorsa.config_for_site(site, n_heads, arguments.n_qk or default, arguments.k)


def _sources(arguments: argparse.Namespace, model: LanguageModel) -> tuple[ActivationSource, ActivationSource]:
    """Training and held-out activations, from the cache or computed on the way."""
    from lorsa_utils import store
    from lorsa_utils.activations import ActivationCache, ActivationStream

    sources: dict[str, ActivationSource] = {}
    if arguments.cache:
        policy = None if arguments.bos == "auto" else arguments.bos
        sources["train"] = cached = ActivationCache(arguments.cache, "train", model=model, bos_policy=policy)
        if missing := sorted(set(arguments.layer) - set(cached.layers)):
            raise UserError(
                f"{arguments.cache} holds layers {list(cached.layers)}, not {missing[0]}; cache that layer."
            )
        if "held_out" in store.read_json(Path(arguments.cache) / "manifest.json")["splits"]:
            sources["held_out"] = ActivationCache(arguments.cache, "held_out", model=model)
    else:
        splits, text = _splits(arguments, model)
        sources = {
            split: ActivationStream(model, sequences, arguments.layer, text) for split, sequences in splits.items()
        }
    available = sources["train"].n_tokens
    if available < arguments.tokens:
        _note(f"The text holds {available:,} tokens, so it is read {arguments.tokens / available:.1f} times.")
    if "held_out" not in sources:
        _note("The text is too short to hold a part of it out: results are measured on the training text.")
    return sources["train"], sources.get("held_out", sources["train"])


def _tokens_seen(folder: Path) -> int:
    """Tokens that a run to resume was already trained on."""
    from lorsa_utils import store

    file = folder / "state" / "state.safetensors"
    return int(json.loads(store.read_tensor_metadata(file)["counters"])["tokens_seen"]) if file.is_file() else 0


def _tell_cost(
    specs: Sequence[RunSpec],
    source: ActivationSource,
    sites: Mapping[int, AttentionSite],
    model: LanguageModel,
    resume: bool,
) -> None:
    """Refuse a disk that is too small; say what the run costs when it takes more than a minute."""
    from lorsa_utils import store

    parameters = sum(spec.module.n_parameters for spec in specs)
    disk = 4 * 4 * parameters  # weights, and a state of weights and Adam's two moments
    store.require_free_bytes(specs[0].folder, disk, "The run")
    if resume or specs[0].train.tokens < 100_000:
        return
    seconds = _estimate_seconds(specs, source, sites, model)
    if seconds < 60:
        return
    train = specs[0].train
    units = max(getattr(spec.module, "n_ov_heads", 0) or getattr(spec.module, "n_features", 0) for spec in specs)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.model.parameters())
    memory = weights + 16 * parameters + 16 * train.batch_size * source.context * units
    time_and_space = f"about {seconds / 60:.1f} minutes, {memory / 1e9:.1f} GB of memory, {disk / 1e9:.2f} GB on disk"
    _note(f"Training on {train.tokens:,} tokens: {time_and_space}.")


def _estimate_seconds(
    specs: Sequence[RunSpec], source: ActivationSource, sites: Mapping[int, AttentionSite], model: LanguageModel
) -> float:
    """Time of the second of two batches (activations and a step of every module), times the number of steps.

    Nothing is kept.
    """
    from lorsa_utils.train import Run

    train = specs[0].train
    batches = source.batches(train.batch_size, layers=list(sites))
    first = next(batches)
    began = time.perf_counter()
    second = next(batches, first)
    seconds = time.perf_counter() - began
    for spec in specs:
        run = Run(spec, {}, model.device)
        run.start(sites[spec.layer], first)
        run.train_step(first)
        began = time.perf_counter()
        run.train_step(second)
        seconds += time.perf_counter() - began
    return seconds * train.tokens / max(1, int(second.mask.sum()))


def _require_finished(folder: Path) -> None:
    """Refuse a folder that does not hold a finished run."""
    from lorsa_utils.lorsa import read_module_settings

    read_module_settings(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} holds an unfinished run; finish it with `lorsa train ... --resume`.")


def _run_config(folder: Path) -> dict[str, Any]:
    """The config.json of a finished run that says which model and layer it is for."""
    from lorsa_utils import store

    _require_finished(folder)
    config: dict[str, Any] = store.read_json(folder / "config.json")
    if "source" not in config or config.get("layer") is None:
        raise UserError(
            f"{folder} does not say which model and layer it is for; import it again with --model and --layer."
        )
    return config


def _sequences_of_run(
    documents: list[Any], model: LanguageModel, source: Mapping[str, Any], n_tokens: int, seed: int
) -> Sequences:
    """Text cut into sequences as the run's training text was."""
    from lorsa_utils.text import tokenize

    sequences = tokenize(
        documents,
        model.tokenizer,
        context=source["context"],
        n_tokens=n_tokens,
        bos_policy=source["bos_policy"],
        seed=seed,
    )
    if sequences.shortfall:
        _note(sequences.shortfall)
    return sequences


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa eval`: reconstruction and spliced loss on text of the caller's choice."""
    from lorsa_utils import metrics
    from lorsa_utils.lorsa import load

    folder = Path(arguments.folder)
    config = _run_config(folder)
    module = load(folder)
    source = config["source"]
    model = _model_of_run(folder, source, arguments.model, arguments.device)
    documents = _documents(arguments.text, source.get("text"), arguments.tokens)
    sequences = _sequences_of_run(documents, model, source, arguments.tokens, config.get("train", {}).get("seed", 0))
    _tell_eval_cost(model, sequences, arguments.batch_size)
    result = metrics.evaluate_spliced(
        model, config["layer"], module.to(model.device), sequences, arguments.batch_size, progress=True
    )
    if result["fvu"] > 1:
        _note(
            "Warning: FVU is above 1, worse than predicting the mean; this text or model is probably not what the module was made for."
        )
    keys = (
        "fvu",
        "fvu_token_mean",
        "ce",
        "ce_spliced",
        "ce_mean_ablated",
        "ce_recovered",
        "l0",
        "dead_fraction",
        "n_tokens",
        "cosine",
    )
    return {key: result[key] if math.isfinite(result[key]) else None for key in keys}


def heads(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa heads`: families, scores, logits and contexts of every head."""
    import torch

    from lorsa_utils import store
    from lorsa_utils.heads import survey
    from lorsa_utils.lorsa import Lorsa

    folder, out = Path(arguments.folder), Path(arguments.out)
    config = _run_config(folder)
    if out.suffix != ".parquet":
        raise UserError(f"The table is written as Parquet; give --out a name that ends in .parquet, not {out.name}.")
    lorsa = Lorsa.load(folder)
    store.require_writable(out.parent)
    source = config["source"]
    model = _model_of_run(folder, source, arguments.model, arguments.device)
    documents = _documents(arguments.text, source.get("text"), arguments.tokens)
    sequences = _sequences_of_run(documents, model, source, arguments.tokens, arguments.seed)
    began = time.perf_counter()
    with torch.no_grad():
        found = survey.describe(
            model,
            config["layer"],
            lorsa.to(model.device).requires_grad_(False),
            sequences,
            [(document.id, document.text) for document in documents],
            removed=arguments.removed,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
    with store.atomic_path(out) as temporary:
        found.table.to_parquet(temporary, index=False)
    for sentence in found.discovery.skipped.values():
        _note(sentence)
    return {
        "path": str(out),
        "heads": len(found.table),
        "dead_fraction": float(found.table["dead"].mean()),
        "families": found.discovery.counts(),
        "skipped": found.discovery.skipped,
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }


def show(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa show`: pages of heads."""
    import torch

    from lorsa_utils import store
    from lorsa_utils.heads import origins, survey, units
    from lorsa_utils.lorsa import Lorsa
    from lorsa_utils.view import evidence, pages

    folder, out, chosen = Path(arguments.folder), Path(arguments.out), list(dict.fromkeys(arguments.head))
    config, lorsa = _run_config(folder), Lorsa.load(folder)
    heads = units.LorsaHeads(lorsa)
    heads.check(chosen)
    is_page = out.suffix in (".html", ".htm")
    if is_page != (len(chosen) == 1):
        wanted = "a file name that ends in .html" if len(chosen) == 1 else "a folder"
        raise UserError(f"For {len(chosen)} page{'s' * (len(chosen) > 1)} give --out {wanted}, not {out.name}.")
    store.require_writable(out.parent if is_page else out)
    beside = {name: _beside(getattr(arguments, name), name, config) for name in ("sae", "transcoder")}
    table = _table_of_heads(arguments.table or folder / "heads.parquet", required=arguments.table is not None)
    explanations = _explanations(arguments.explanations, config["layer"])
    source, layer = config["source"], config["layer"]
    model = evidence.ReadOnce(_model_of_run(folder, source, arguments.model, arguments.device), layer)
    documents = _documents(arguments.text, source.get("text"), arguments.tokens)
    sequences = _sequences_of_run(documents, model, source, arguments.tokens, arguments.seed)
    began = time.perf_counter()
    with torch.no_grad():
        lorsa.to(model.device).requires_grad_(False)
        found = survey.survey(model, layer, heads, sequences, batch_size=arguments.batch_size)
        few = slice(0, min(32, len(sequences.tokens)))
        x = model.capture(sequences.tokens[few].long(), [layer])[layer][0].float()
        mean = units.mean_head_values(model.site(layer), x, sequences.mask[few].to(x.device))
        shares = origins.mhsa_shares(model, layer, lorsa, mean, sequences, batch_size=arguments.batch_size).shares
        options = {"table": table, "shares": shares, "sae": beside["sae"], "input_sae": beside["transcoder"]}
        options |= {"batch_size": arguments.batch_size, "seed": arguments.seed, "explanations": explanations}
        collected = evidence.collect(model, layer, lorsa, chosen, found, sequences, **options)
        if is_page:
            store.write_text(out, pages.head_page(next(collected)))
            written = [out]
        else:
            written = [*pages.write_pages(collected, out, chosen).values()]
    answer = {"path": str(out)} if is_page else {"path": str(out), "pages": [str(path) for path in written]}
    return answer | {"bytes": sum(path.stat().st_size for path in written), "seconds": time.perf_counter() - began}


def _beside(folder: str | None, kind: str, config: Mapping[str, Any]) -> Any:
    """The SAE or transcoder of the same layer that heads are compared with."""
    from lorsa_utils import store
    from lorsa_utils.lorsa import SAE

    if folder is None:
        return None
    module, layer = SAE.load(folder), store.read_json(Path(folder) / "config.json").get("layer")
    if module.config.kind != kind or layer != config["layer"]:
        raise UserError(
            f"{folder} holds a {module.config.kind} of layer {layer}; give a {kind} of layer {config['layer']}."
        )
    return module.requires_grad_(False)


def _explanations(path: str | None, layer: int) -> dict[int, tuple[str | None, float | None]]:
    """Explanations of the Lorsa heads of a layer, each with its detection score where there is one."""
    import pandas as pd

    from lorsa_utils.exceptions import UserError

    if path is None:
        return {}
    try:
        scores = pd.read_parquet(path)
        mine = scores[(scores["dictionary"] == "Lorsa") & (scores["layer"] == layer) & scores["explanation"].notna()]
        found = (mine["detection"] if "detection" in mine else pd.Series(math.nan, index=mine.index)).tolist()
        rows = zip(mine["unit"].tolist(), mine["explanation"].tolist(), found, strict=True)
        return {int(unit): (str(text), None if math.isnan(score) else float(score)) for unit, text, score in rows}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a table of explanations; make it with `lorsa autointerp`."
        ) from error


def _table_of_heads(path: str | Path, required: bool) -> Any:
    """The Parquet table of `lorsa heads`, None when it is not there and need not be."""
    import pandas as pd

    from lorsa_utils.exceptions import UserError

    if not required and not Path(path).is_file():
        return None
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table of heads; make it with `lorsa heads`.") from error
    if not {"head", "families"} <= set(table):
        raise UserError(f"{path} is no table of heads; make it with `lorsa heads`.")
    return table


def autointerp(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa autointerp`: explanations, scores, tests."""
    import pandas as pd

    from lorsa_utils import store
    from lorsa_utils.activations import ActivationStream
    from lorsa_utils.autointerp import examples, judges, study

    began = time.perf_counter()
    study.check_scorers(arguments.scorers)
    dictionaries, config = _dictionaries(arguments.folders)
    out = store.require_writable(arguments.out)
    if arguments.backend == "openai" and not arguments.judge_model:
        raise UserError("The openai backend needs the name of a model; give it with --judge-model.")
    if arguments.backend == "replay" and not arguments.answers:
        raise UserError("The replay backend needs recorded answers; give an answers.jsonl with --answers.")
    answers = judges.Answers(out / "answers.jsonl" if arguments.backend in ("local", "openai") else None)
    try:
        judge: judges.Judge | None = None
        if arguments.backend == "rules":
            judge = judges.RulesJudge()
        elif arguments.backend == "replay":
            judge = judges.ReplayJudge(arguments.answers, arguments.judge_model)
        elif arguments.backend == "openai":
            judge = judges.OpenAIJudge(arguments.judge_model, answers, arguments.concurrency)
        source, folder = config["source"], Path(arguments.folders[0])
        model = _model_of_run(folder, source, arguments.model, arguments.device)
        if judge is None:
            judge = judges.LocalJudge(_judge_model(arguments, model), answers)
        documents = _documents(arguments.text, source.get("text"), arguments.tokens)
        sequences = _sequences_of_run(documents, model, source, arguments.tokens, arguments.seed)
        layers = sorted({one.layer for one in dictionaries})
        moved = [one._replace(module=one.module.to(model.device).requires_grad_(False)) for one in dictionaries]
        budget, sites = examples.Budget(units=arguments.units), {layer: model.site(layer) for layer in layers}
        _tell_eval_cost(model, sequences, arguments.batch_size, passes=1)
        stream = ActivationStream(model, sequences, layers)
        firings = examples.record_firings(
            stream, moved, sites, model.tokenizer, budget, arguments.batch_size, arguments.seed
        )
        sets = [examples.examples(one, budget, arguments.seed) for one in firings]
        expected = study.estimate(sets, arguments.scorers, prices=arguments.prices)
        study.confirmed(judge, expected, lambda sentence: _agreed(sentence, arguments.yes))
        scores = study.study(sets, judge, arguments.scorers, seed=arguments.seed)
    finally:
        answers.close()
    with store.atomic_path(out / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    tests, counts = pd.DataFrame(), pd.DataFrame()
    if len({one.name for one in dictionaries}) == 2:
        first, second = sorted({one.name for one in dictionaries}, key=lambda name: name != "Lorsa")
        with contextlib.suppress(UserError):  # no layer has both: there is nothing to test
            tests = study.compare_dictionaries(scores, first, second, arguments.scorers, arguments.seed)
            counts = study.outcomes(tests)
            store.write_text(out / "tests.csv", tests.to_csv(index=False))
    answer = {
        "path": str(out),
        "judge": judge.name + (" (a proxy: no language model)" if judge.is_proxy else ""),
        "prompts_sha256": judges.prompts_sha256(),
        "unreadable": f"{judge.tally.failed} of {judge.tally.asked} answers",
        "constant": study.constant_answer(sets[0]),
        "scores": _without_nan(study.summary(scores, seed=arguments.seed)),
        "tests": _without_nan(tests),
        "outcomes": _without_nan(counts),
        "left_out": {f"{one.dictionary.name} {one.dictionary.layer}": one.left_out for one in sets},
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }
    store.write_json(out / "results.json", answer)
    return answer


def _without_nan(table: Any) -> list[dict[str, Any]]:
    rows = table.to_dict("records")
    return [
        {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}
        for row in rows
    ]


def _dictionaries(folders: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Modules of several run folders that read the same model and text, and the config of the first."""
    from lorsa_utils.autointerp.examples import Dictionary
    from lorsa_utils.lorsa import Lorsa, load

    found: list[Dictionary] = []
    configs: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        configs.append(_run_config(folder))
        module = load(folder)
        if not isinstance(module, Lorsa) and module.config.kind != "sae":
            raise UserError(f"{folder} holds a transcoder, which has no source tokens; give Lorsa and SAE runs.")
        name = "Lorsa" if isinstance(module, Lorsa) else "SAE"
        if any((one.name, one.layer) == (name, configs[-1]["layer"]) for one in found):
            name = f"{name} {folder.name}"
        found.append(Dictionary(name, configs[-1]["layer"], module))
        for key in ("model_sha256", "context", "bos_policy"):
            if configs[-1]["source"][key] != configs[0]["source"][key]:
                raise UserError(
                    f"{folder} and {folders[0]} differ in {key.removesuffix('_sha256')}; give runs that share it."
                )
    return found, configs[0]


def _judge_model(arguments: argparse.Namespace, model: LanguageModel) -> LanguageModel:
    from lorsa_utils.models import load_model

    return load_model(arguments.judge_model, device=arguments.device) if arguments.judge_model else model


def _agreed(sentence: str, yes: bool) -> bool:
    """Tell a cost, and ask a person unless they have agreed beforehand."""
    from lorsa_utils.exceptions import UserError

    _note(sentence)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("Nobody is there to confirm the estimate; add --yes to go on without being asked.")
    _note("Go on? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _tell_eval_cost(model: LanguageModel, sequences: Sequences, batch_size: int, passes: int = 3) -> None:
    """Say what passes of the model over the text cost when that is more than a minute."""
    tokens, mask = sequences.tokens[:batch_size].to(model.device), sequences.mask[:batch_size].to(model.device)
    began = time.perf_counter()
    float(model.loss(tokens.long(), mask)[0].sum())  # reading a value waits for the device
    seconds = passes * (time.perf_counter() - began) * len(sequences.tokens) / len(tokens)
    if seconds > 60:
        times = "Three passes" if passes == 3 else "One pass"
        _note(f"{times} of the model over {sequences.n_tokens:,} tokens: about {seconds / 60:.0f} minutes.")


def _model_of_run(folder: Path, source: Mapping[str, Any], override: str | None, device: str) -> LanguageModel:
    """The very model that a run was trained on, in whichever dtype that was."""
    import torch

    from lorsa_utils.exceptions import UserError
    from lorsa_utils.models import load_model, resolve_device

    name = override or source["model"]
    revision = None if override else source["revision"]
    on_gpu = resolve_device(device).type == "cuda"
    # The hash of the weights depends on their dtype, which follows the machine that trained: try this machine's first.
    dtypes = (
        [torch.bfloat16, torch.float32, torch.float16] if on_gpu else [torch.float32, torch.bfloat16, torch.float16]
    )
    for dtype in dtypes:
        model = load_model(name, revision=revision, device=device, dtype=dtype)
        if model.tokenizer_fingerprint != source["tokenizer_sha256"]:
            raise UserError(
                f"{name} has another tokenizer than the model that {folder} was trained on; give that model with --model."
            )
        if model.fingerprint == source["model_sha256"]:
            return model
    raise UserError(
        f"{name} is not the model that {folder} was trained on ({source['model']}, other weights); give that one with --model."
    )


def _documents(text: Sequence[str] | None, trained_on: str | list[str] | None, n_tokens: int) -> list[Any]:
    """What to measure on: all of the caller's text, else the held-out part of what the run was trained on."""
    from lorsa_utils.exceptions import UserError

    if text:
        corpus, _ = _corpus(text, None, n_tokens)
        return [*corpus.train, *corpus.held_out]
    if trained_on is None:
        raise UserError("This run does not say which text it was trained on; give a text with --text.")
    if isinstance(trained_on, list):
        if missing := [path for path in trained_on if not Path(path).exists()]:
            raise UserError(f"The run's own text {missing[0]} is no longer there; give a text with --text.")
        corpus, _ = _corpus(trained_on, None, n_tokens)
    else:
        corpus, _ = _corpus(None, None if trained_on == "embedded" else trained_on, 10 * n_tokens)
    if not corpus.held_out:
        _note("The run's text is too short to hold a part of it out: results are measured on the training text.")
    return corpus.held_out or corpus.train


def circuit(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa circuit`: accuracy, ranking, faithfulness and completeness, errors, and one prompt's graph."""
    from lorsa_utils import store
    from lorsa_utils.circuits import faithfulness
    from lorsa_utils.circuits import nodes as circuits
    from lorsa_utils.heads import tasks

    began = time.perf_counter()
    for path in (arguments.graph, arguments.out):
        if path:
            store.require_writable(Path(path).parent)
    sparse, vocabulary = _nodes(arguments)
    task = _task(arguments, vocabulary)
    found = tasks.accuracy(circuits.clean_logits(sparse.model, task, arguments.batch_size), task)
    tasks.require_able(task.name, found)
    _tell_circuit_cost(sparse, task, faithfulness.usual_sizes(sparse.n_nodes), arguments.batch_size)
    kind = sparse.kind
    settings = (arguments.metric, arguments.ablation, arguments.seed)
    curves = faithfulness.compare(
        {kind: sparse}, task, *settings, exact_up_to=FEW_NODES, batch_size=arguments.batch_size
    )
    table = faithfulness.curve_table(curves, arguments.seed)
    if arguments.out:
        store.write_text(arguments.out, table.to_csv(index=False))
    discovery, held_out = task.split()
    instead = circuits.baseline(sparse, held_out, arguments.ablation)
    scores = faithfulness.rank_scores(
        sparse, discovery, arguments.metric, arguments.ablation, FEW_NODES, arguments.batch_size
    )
    order = faithfulness.ranking(scores, sparse.error_nodes)[:10]
    effects = circuits.effects(sparse, held_out, order, instead, arguments.metric, arguments.batch_size).mean(dim=1)
    errors = faithfulness.error_shares(sparse, held_out, instead, arguments.metric, arguments.batch_size).iloc[-1]
    return {
        "task": task.name,
        "nodes": kind,
        "layers": list(sparse.layers),
        "accuracy": found,
        "metric": float(curves[kind].all.mean()),
        "metric_without_the_layers": float(curves[kind].none.mean()),
        "error_share": float(errors["errors"]),
        "circuit": [
            {"node": str(sparse.node(node)), "effect": float(effect)}
            for node, effect in zip(order, effects, strict=True)
        ],
        "curves": [
            {key: None if value != value else value for key, value in row.items()} for row in table.to_dict("records")
        ],
        "graph": _graph(arguments, sparse, task, vocabulary) if arguments.graph else None,
        "seconds": time.perf_counter() - began,
    }


def _nodes(arguments: argparse.Namespace) -> tuple[SparseModel, Vocabulary]:
    """The model with its layers taken apart, and its vocabulary."""
    from lorsa_utils.circuits import nodes as circuits
    from lorsa_utils.heads.prompts import Vocabulary
    from lorsa_utils.lorsa import load
    from lorsa_utils.models import load_model
    from lorsa_utils.text import _bos_id

    folders = [Path(folder) for folder in arguments.folders]
    if not folders:
        if arguments.nodes != "mhsa" or not arguments.layers:
            raise UserError("No run folder was given; name those of `lorsa train`, or take --nodes mhsa with --layers.")
        model = load_model(arguments.model or "smollm2", device=arguments.device)
        return circuits.take_apart(model, arguments.layers), Vocabulary(
            model.tokenizer, _bos_id(model.tokenizer, "auto")
        )
    configs = [_run_config(folder) for folder in folders]
    if len({config["source"]["model_sha256"] for config in configs}) > 1:
        raise UserError("These runs were trained on different models; give runs of one model.")
    layers = [config["layer"] for config in configs]
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise UserError(f"Layer {twice[0]} is given twice; give one run folder for each layer.")
    model = _model_of_run(folders[0], configs[0]["source"], arguments.model, arguments.device)
    vocabulary = Vocabulary(model.tokenizer, _bos_id(model.tokenizer, configs[0]["source"]["bos_policy"]))
    if arguments.nodes == "mhsa":
        return circuits.take_apart(model, layers), vocabulary
    modules = {}
    for folder, config in zip(folders, configs, strict=True):
        if config["module"]["kind"] != arguments.nodes:
            raise UserError(
                f"{folder} holds a {config['module']['kind']}, not a {arguments.nodes}; give --nodes or the folder that fits."
            )
        modules[config["layer"]] = load(folder, model.device)
    return circuits.take_apart(model, modules), vocabulary


def _task(arguments: argparse.Namespace, vocabulary: Vocabulary) -> Task:
    """The task's prompts, or the caller's own."""
    from lorsa_utils.heads import tasks

    if not arguments.prompts:
        return tasks.make(arguments.task, vocabulary, max(4, arguments.pairs), arguments.seed)
    path = Path(arguments.prompts)
    try:
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines ({error}); write one object a line.") from error
    if len(pairs) < 2 or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(
            f"{path} needs at least two pairs, one JSON object a line: half of them rank nodes, half measure."
        )
    return tasks.from_texts(vocabulary, path.stem, pairs)


def _tell_circuit_cost(sparse: SparseModel, task: Task, sizes: Sequence[int], batch_size: int) -> None:
    """Say what the curves cost when that is more than a minute."""
    import torch

    from lorsa_utils.circuits import nodes as circuits

    part = task.rows(slice(0, batch_size))
    began = time.perf_counter()
    circuits.measure(
        sparse,
        part,
        torch.ones(1, sparse.n_nodes, dtype=torch.bool),
        circuits.baseline(sparse, part),
        batch_size=batch_size,
    )
    seconds = (time.perf_counter() - began) / len(part) * len(task) / 2 * (3 * len(sizes) + 20)
    if seconds > 60:
        _note(f"About {3 * len(sizes) + 20} passes over {len(task) // 2} prompts: {seconds / 60:.0f} minutes.")


def _graph(arguments: argparse.Namespace, sparse: SparseModel, task: Task, vocabulary: Vocabulary) -> dict[str, Any]:
    """Trace the first prompt and write its graph."""
    import torch

    from lorsa_utils.circuits import graph
    from lorsa_utils.circuits import nodes as circuits

    first = task.rows(slice(0, 1))
    answers, wrong = ([token for token in side[0].tolist() if token >= 0] for side in (first.answers, first.wrong))
    trace = graph.Trace(sparse, first.clean[0, : int(first.position[0]) + 1], answers, wrong)
    found = graph.trace_graph(trace, task.name, vocabulary.tokenizer, n_traced=arguments.traced, progress=True)
    with torch.no_grad():
        chance = circuits.clean_logits(sparse.model, first).softmax(dim=1)[0, answers].sum()
    graph.write_graph(found, arguments.graph, probability=float(chance))
    return {"path": arguments.graph, "nodes": len(found.nodes), "links": len(found.links), **found.facts}


def import_(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa import`: a run folder from published weights."""
    from lorsa_utils.kit import checkpoints, hub
    from lorsa_utils.models import load_model
    from lorsa_utils.text import tokenize

    if (Path(arguments.source) / "checkpoint.json").is_file():
        return {"path": str(checkpoints.unpack(arguments.source, arguments.folder)), "format": "small", "warning": None}
    if arguments.model is None:
        answer = hub.import_checkpoint(arguments.source, arguments.folder, layer=arguments.layer)
    else:
        model = load_model(arguments.model, device=arguments.device)
        corpus, text = _corpus(arguments.text, arguments.dataset, 10 * arguments.tokens)
        documents = [*corpus.train, *corpus.held_out] if arguments.text else corpus.held_out or corpus.train

        def sequences(context: int) -> Sequences:
            return tokenize(
                documents, model.tokenizer, context=min(context, model.context_length), n_tokens=arguments.tokens
            )

        answer = hub.import_checkpoint(arguments.source, arguments.folder, model, arguments.layer, sequences, text)
    if answer["warning"]:
        _note(answer["warning"])
    return answer


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa export`: published formats, and the Hub."""
    from lorsa_utils.kit import checkpoints, hub

    _require_finished(Path(arguments.folder))
    if arguments.format == "small":
        path = checkpoints.pack(arguments.folder, arguments.target)
        answer: dict[str, Any] = {
            "path": str(path),
            "format": "small",
            "bytes": sum(file.stat().st_size for file in path.iterdir()),
        }
    else:
        answer = hub.export_checkpoint(arguments.folder, arguments.target)
    if arguments.push:
        answer["url"] = hub.push_to_hub(arguments.target, arguments.push, arguments.path_in_repo, arguments.private)
    return answer


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa bench`."""
    from lorsa_utils import store
    from lorsa_utils.kit import bench
    from lorsa_utils.models import resolve_device

    file = Path(arguments.out) if arguments.out else store.data_dir() / "benchmarks.csv"
    store.require_writable(file.parent)
    rows = []
    for shape in arguments.shape:
        measured = bench.measure(shape, resolve_device(arguments.device), arguments.backend, arguments.rounds)
        bench.append_rows(measured, file)
        rows += [
            {key: None if value != value else value for key, value in row.items()}
            for row in measured.to_dict("records")
        ]
    return {"file": str(file), "rows": rows}


def reproduce(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa reproduce`: the notebooks in order."""
    from lorsa_utils import store
    from lorsa_utils.kit import reproduce as notebooks

    statuses = notebooks.reproduce(arguments.profile, arguments.only, arguments.force, run_dir=arguments.run_dir)
    folder = Path(arguments.run_dir) if arguments.run_dir else store.data_dir() / "runs" / arguments.profile
    return {
        "profile": arguments.profile,
        "index": str(folder / "index.html"),
        "notebooks": [status.to_dict() for status in statuses],
        "exit_code": int(any(status.status == "failed" for status in statuses)),
    }


def claims(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa claims`: claims, numbers, verdicts."""
    from lorsa_utils import store
    from lorsa_utils.kit import claims as paper
    from lorsa_utils.kit import notebook

    folder = Path(arguments.run_dir) if arguments.run_dir else store.data_dir() / "runs" / arguments.profile
    profile = notebook.profile_of_run(folder, arguments.profile)
    readme = store.CHECKOUT / "README.md"
    rows = paper.publish(folder, profile, readme) if arguments.publish else paper.of_run(folder, profile)
    if arguments.json:
        return {"count": paper.count(rows), "claims": paper.as_json(rows)}
    shown = paper.table(rows, profile).to_dict("records")
    return {f"{row['id']} {row['claim']}": f"{row['verdict']} ({row['our number']})" for row in shown} | {
        "all": paper.count(rows)
    }


# ---- doctor


def doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """`lorsa doctor`: what is here, what is missing, and what a profile would cost."""
    import psutil

    from lorsa_utils import store
    from lorsa_utils.fetch import EMBEDDED_NAME
    from lorsa_utils.kit.notebook import provenance
    from lorsa_utils.view.figures import can_draw_png

    memory = psutil.virtual_memory()
    model = store.data_dir() / "models" / EMBEDDED_NAME
    fetched = (model / "source.json").is_file()
    answer: dict[str, Any] = {
        **provenance(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "data": str(store.data_dir()),
        "disk_free_gb": round(store.free_bytes(store.data_dir()) / 1e9, 1),
        "embedded_model": str(model) if fetched else None,
        "static_images": can_draw_png(),
        "missing": _missing(fetched),
    }
    if arguments.profile:
        answer["estimate"] = _profile_estimate(arguments.profile)
    if arguments.preset:
        answer["preset"] = _preset_estimate(arguments.preset)
    return answer


def _missing(fetched: bool) -> list[str]:
    """One sentence for each thing that is not here, with its fix."""
    import importlib.util

    from lorsa_utils.exceptions import UserError
    from lorsa_utils.kit.notebook import check_versions
    from lorsa_utils.view.figures import can_draw_png

    missing = [] if fetched else ["the embedded model: it is fetched when first needed, or now by `lorsa fetch`"]
    if not can_draw_png():
        missing.append("Chrome or Chromium: figures have no static images; install chromium")
    packages = {
        "papermill": "notebooks cannot be run by `lorsa reproduce`; pip install 'lorsa-utils[notebooks]'",
        "datasets": "--dataset does not work; pip install 'lorsa-utils[hub]'",
    }
    missing += [f"{name}: {effect}" for name, effect in packages.items() if importlib.util.find_spec(name) is None]
    try:
        check_versions()
    except UserError as error:
        missing.append(str(error))
    return missing


def _preset_estimate(name: str) -> dict[str, Any]:
    """Hours, memory and disk of a preset, by arithmetic: at an H100's rate and at this machine's."""
    import psutil
    import torch

    from lorsa_utils.config import get_preset
    from lorsa_utils.kit import presets

    preset = get_preset(name)
    here = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
    about = {
        "name": name,
        "model": preset.model,
        "licence": preset.licence,
        "shape_from": preset.source,
        "layers": preset.n_layers,
    }
    about |= {"tokens": preset.tokens, "how": "by arithmetic, not measured; expect several times the hours"}
    return about | {
        f"at {presets.H100_RATE / 1e12:.0f} TFLOP/s and 80 GB (H100)": presets.estimate(preset),
        "at this machine's rate and memory": presets.estimate(preset, _matmul_rate(), here),
    }


def _model_shape(name: str) -> tuple[float, int, int, int]:
    """Parameters without the embedding, layers, d_model and width of a head of a model that profiles use."""
    from lorsa_utils.config import PRESETS

    shapes = {
        preset.model: (preset.multiplied, preset.n_layers, preset.d_model, preset.d_head) for preset in PRESETS.values()
    }
    return shapes.get(name, (106e6, 30, 576, 64))  # smollm2


def _profile_estimate(name: str) -> dict[str, Any]:
    """Minutes, disk and memory of a profile.

    Minutes are measured ones where there are any, else from this machine's matrix rate.
    """
    from lorsa_utils.activations import bytes_per_sequence
    from lorsa_utils.config import get_profile
    from lorsa_utils.exceptions import UserError
    from lorsa_utils.kit.bench import Shape
    from lorsa_utils.kit.presets import step_flops
    from lorsa_utils.kit.reproduce import expected_minutes

    profile = get_profile(name)
    size, n_layers, d_model, d_head = _model_shape(profile.model)
    lorsa = 2 * d_model * (profile.n_qk * d_head + profile.n_heads)
    saes = 2 * d_model * (profile.sae_features + profile.sae_features_equal_parameters)
    try:
        minutes = expected_minutes(name)
    except UserError:  # the package without its notebooks
        minutes = None
    measured = minutes is not None
    if minutes is None:
        # Operations a token: the model's forward pass once, a step of every Lorsa, and about 3 for each weight of an
        # SAE.
        forward = 2 * size * (max(*profile.layers, profile.layer) + 1) / n_layers
        layer = Shape(d_model, profile.n_qk, d_head, profile.n_heads, profile.k, profile.batch_size, profile.context)
        steps = step_flops(layer) * (1 + len(profile.layers)) + 3 * len(profile.layers) * saes
        minutes = profile.train_tokens * (forward + steps) / _matmul_rate() / 60
    sequences = (profile.cache_tokens + profile.held_out_tokens) // (profile.context - 1) + 1
    disk = sequences * bytes_per_sequence(d_model, len({*profile.layers, profile.layer}), profile.context, "bfloat16")
    memory = (
        4 * 1.5 * size
        + len(profile.layers) * 16 * (lorsa + saes)
        + 64 * profile.batch_size * profile.context * profile.n_heads
    )
    return {
        "profile": name,
        "minutes": round(minutes, 1),
        "minutes_are": "of the last run here, else stated in the notebooks" if measured else "by arithmetic, rough",
        "disk_gb": round(disk / 1e9 + 1.2, 1),
        "memory_gb": round(memory / 1e9 + 1.0, 1),
    }


def _matmul_rate() -> float:
    """Floating-point operations a second in one large matrix product on the default device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)

    def product() -> float:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        return time.perf_counter() - began

    return 2 * 1024**3 / min(product() for _ in range(4))


if __name__ == "__main__":
    sys.exit(main())
