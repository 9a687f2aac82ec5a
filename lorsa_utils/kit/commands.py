"""What the commands of `lorsa` do: a function takes a command's options, declared in `cli`, and returns its answer.

An answer is a dict of JSON values. `lines` in it is what people see in its place, `exit_code` is not shown.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorsa_utils import activations, metrics, store, training
from lorsa_utils.activations import ActivationCache, ActivationSource, ActivationStream
from lorsa_utils.config import TrainConfig, get_preset
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa, load, read_module_settings
from lorsa_utils.models import LanguageModel, load_model, resolve_device
from lorsa_utils.processes import World, join_world
from lorsa_utils.text import Corpus, Sequences, bos_id, load_corpus, tokenize
from lorsa_utils.training import RunSpec, make_logger, module_config

if TYPE_CHECKING:
    import pandas as pd

    from lorsa_utils.autointerp.examples import Dictionary
    from lorsa_utils.circuits.nodes import SparseModel
    from lorsa_utils.heads.prompts import Vocabulary
    from lorsa_utils.heads.tasks import Task

Paths = Sequence[str] | None
Answer = dict[str, Any]

IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Of those that torchrun started."""
FEW_NODES = 64
"""So many nodes of a circuit are ranked by removing each, more by gradients."""


def note(text: str) -> None:
    """Say something on stderr, once however many processes there are."""
    if IS_FIRST_PROCESS:
        print(text, file=sys.stderr, flush=True)


def _records(table: pd.DataFrame) -> list[Answer]:
    """Rows as JSON values: what is not a number is None."""
    return [{key: None if value != value else value for key, value in row.items()} for row in table.to_dict("records")]


# ---- text, and what a run folder was trained on


def _corpus(text: Paths, dataset: str | None, n_tokens: int) -> tuple[Corpus, str | list[str]]:
    """The text that the options ask for, and its name as it is saved with a run."""
    corpus = load_corpus(text, dataset, max_tokens=n_tokens)
    return corpus, [str(Path(path).absolute()) for path in text] if text else dataset or "embedded"


def _splits(
    model: LanguageModel,
    text: Paths,
    dataset: str | None,
    tokens: int,
    held_out_tokens: int,
    context: int,
    bos: str,
    seed: int,
) -> tuple[dict[str, Sequences], str | list[str]]:
    """`train` and, where there is text to hold out, `held_out` sequences; and the text's name."""
    corpus, name = _corpus(text, dataset, tokens + held_out_tokens)
    parts = {"train": (corpus.train, tokens), "held_out": (corpus.held_out, held_out_tokens)}
    return {
        split: tokenize(documents, model.tokenizer, context=context, n_tokens=n, bos_policy=bos, seed=seed)
        for split, (documents, n) in parts.items()
        if documents or split == "train"
    }, name


def _require_finished(folder: Path) -> None:
    read_module_settings(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} holds an unfinished run; finish it with `lorsa train ... --resume`.")


def _run_config(folder: Path) -> dict[str, Any]:
    """The config.json of a finished run that says which model and layer it is for."""
    _require_finished(folder)
    config: dict[str, Any] = store.read_json(folder / "config.json")
    if "source" not in config or config.get("layer") is None:
        raise UserError(
            f"{folder} does not say which model and layer it is for; import it again with --model and --layer."
        )
    return config


def _model_of_run(folder: Path, source: Mapping[str, Any], override: str | None, device: str) -> LanguageModel:
    """The very model that a run was trained on, in whichever dtype that was."""
    name = override or source["model"]
    revision = None if override else source["revision"]
    # The hash of the weights depends on their dtype, which follows the machine that trained: try this machine's first.
    here = torch.bfloat16 if resolve_device(device).type == "cuda" else torch.float32
    for dtype in dict.fromkeys((here, torch.float32, torch.bfloat16, torch.float16)):
        model = load_model(name, revision=revision, device=device, dtype=dtype)
        if model.tokenizer_fingerprint != source["tokenizer_sha256"]:
            raise UserError(
                f"{name} has another tokenizer than the model that {folder} was trained on; "
                "give that model with --model."
            )
        if model.fingerprint == source["model_sha256"]:
            return model
    raise UserError(
        f"{name} is not the model that {folder} was trained on ({source['model']}, other weights); "
        "give that one with --model."
    )


def _documents(text: Paths, trained_on: str | list[str] | None, n_tokens: int) -> list[Any]:
    """What to measure on: all of the caller's text, else the held-out part of what the run was trained on."""
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
        note("The run's text is too short to hold a part of it out: results are measured on the training text.")
    return corpus.held_out or corpus.train


def _to_measure_on(
    folder: Path, config: Mapping[str, Any], text: Paths, n_tokens: int, seed: int, model: str | None, device: str
) -> tuple[LanguageModel, list[Any], Sequences]:
    """The model of a run, documents, and these cut into sequences as the run's training text was."""
    source = config["source"]
    loaded = _model_of_run(folder, source, model, device)
    documents = _documents(text, source.get("text"), n_tokens)
    cut = {"context": source["context"], "bos_policy": source["bos_policy"]}
    sequences = tokenize(documents, loaded.tokenizer, n_tokens=n_tokens, seed=seed, **cut)
    if sequences.shortfall:
        note(sequences.shortfall)
    return loaded, documents, sequences


def _tell_passes(model: LanguageModel, sequences: Sequences, batch_size: int, passes: int = 3) -> None:
    """Say what passes of the model over the text cost when that is more than a minute."""
    tokens, mask = sequences.tokens[:batch_size].to(model.device), sequences.mask[:batch_size].to(model.device)
    began = time.perf_counter()
    float(model.loss(tokens.long(), mask)[0].sum())  # reading a value waits for the device
    seconds = passes * (time.perf_counter() - began) * len(sequences.tokens) / len(tokens)
    if seconds > 60:
        times = "Three passes" if passes == 3 else "One pass"
        note(f"{times} of the model over {sequences.n_tokens:,} tokens: about {seconds / 60:.0f} minutes.")


# ---- the machine


def doctor(profile: str | None, preset: str | None) -> Answer:
    """What is here, what is missing, and what a profile or preset would cost."""
    import psutil

    from lorsa_utils.fetch import EMBEDDED_NAME
    from lorsa_utils.kit import presets
    from lorsa_utils.kit.notebook import provenance
    from lorsa_utils.kit.reproduce import expected_minutes
    from lorsa_utils.view.figures import can_draw_png

    memory, embedded = psutil.virtual_memory(), store.data_dir() / "models" / EMBEDDED_NAME
    fetched = (embedded / "source.json").is_file()
    answer: Answer = {
        **provenance(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "data": str(store.data_dir()),
        "disk_free_gb": round(store.free_bytes(store.data_dir()) / 1e9, 1),
        "embedded_model": str(embedded) if fetched else None,
        "static_images": can_draw_png(),
        "missing": _missing(fetched, can_draw_png()),
    }
    if profile:
        minutes = None
        with contextlib.suppress(UserError):  # the package without its notebooks
            minutes = expected_minutes(profile)
        answer["estimate"] = presets.profile_estimate(profile, minutes)
    if preset:
        answer["preset"] = presets.preset_estimate(preset)
    return answer


def _missing(fetched: bool, images: bool) -> list[str]:
    """One sentence for each thing that is not here, with its fix."""
    import importlib.util

    from lorsa_utils.kit.notebook import check_versions

    missing = [] if fetched else ["the embedded model: it is fetched when first needed, or now by `lorsa fetch`"]
    missing += [] if images else ["Chrome or Chromium: figures have no static images; install chromium"]
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


def fetch(force: bool) -> Answer:
    """The embedded model, checked by its hash."""
    from lorsa_utils.fetch import fetch_embedded_model

    folder = fetch_embedded_model(force=force)
    recorded = store.read_json(folder / "source.json")["safetensors_sha256"]
    digest = store.sha256_file(folder / "model.safetensors")
    if digest != recorded:
        raise UserError(
            f"{folder / 'model.safetensors'} is damaged (another SHA-256 than when it was made); "
            "run `lorsa fetch --force`."
        )
    return {"path": str(folder), "sha256": digest}


def bench(shape: Sequence[str], backend: Sequence[str] | None, rounds: int, device: str, out: str | None) -> Answer:
    """Timings, added to a table."""
    from lorsa_utils.kit import bench

    file = Path(out) if out else store.data_dir() / "benchmarks.csv"
    store.require_writable(file.parent)
    rows: list[Answer] = []
    for name in shape:
        measured = bench.measure(name, resolve_device(device), backend, rounds)
        bench.append_rows(measured, file)
        rows += _records(measured)
    return {"file": str(file), "rows": rows}


# ---- the notebooks


def _run_dir(run_dir: str | None, profile: str) -> Path:
    return Path(run_dir) if run_dir else store.data_dir() / "runs" / profile


def reproduce(profile: str, only: Sequence[str] | None, force: bool, run_dir: str | None) -> Answer:
    """The notebooks in order."""
    from lorsa_utils.kit import reproduce

    statuses = reproduce.reproduce(profile, only, force, run_dir=run_dir)
    return {
        "profile": profile,
        "index": str(_run_dir(run_dir, profile) / "index.html"),
        "notebooks": [status.to_dict() for status in statuses],
        "exit_code": int(any(status.status == "failed" for status in statuses)),
    }


def claims(profile: str, run_dir: str | None, publish: bool) -> Answer:
    """Claims, numbers, verdicts."""
    from lorsa_utils.kit import claims, notebook

    folder = _run_dir(run_dir, profile)
    profile = notebook.profile_of_run(folder, profile)
    readme = store.CHECKOUT / "README.md"
    rows = claims.publish(folder, profile, readme) if publish else claims.of_run(folder, profile)
    lines = {
        f"{row['id']} {row['claim']}": f"{row['verdict']} ({row['our number']})"
        for row in claims.table(rows, profile).to_dict("records")
    }
    count = claims.count(rows)
    return {"count": count, "claims": claims.as_json(rows), "lines": lines | {"all": count}}


# ---- training


def cache(
    layers: Sequence[int],
    tokens: int,
    out: str,
    model: str,
    text: Paths,
    dataset: str | None,
    context: int,
    bos: str,
    held_out_tokens: int,
    seed: int,
    batch_size: int,
    device: str,
    dtype: str,
) -> Answer:
    """Activations of several layers on disk, from one pass."""
    language_model = load_model(model, device=device)
    for layer in layers:
        language_model.site(layer)
    folder = store.require_writable(out)
    splits, name = _splits(language_model, text, dataset, tokens, held_out_tokens, context, bos, seed)
    if sentence := splits["train"].shortfall:
        note(sentence)
    before = _cached(folder, "n_tokens")
    began = time.perf_counter()
    activations.build_cache(language_model, splits, layers, folder, dtype=dtype, batch_size=batch_size, text=name)
    seconds = time.perf_counter() - began
    return {
        "path": str(folder),
        "tokens": splits["train"].n_tokens,
        "held_out_tokens": splits["held_out"].n_tokens if "held_out" in splits else 0,
        "bytes": _cached(folder, "bytes"),
        "tokens_per_s": (_cached(folder, "n_tokens") - before) / seconds,
        "seconds": seconds,
    }


def _cached(folder: Path, key: str) -> int:
    """Sum of `n_tokens` or `bytes` over the shards that are listed so far."""
    if not (folder / "manifest.json").is_file():
        return 0
    splits = store.read_json(folder / "manifest.json")["splits"]
    return sum(shard[key] for entry in splits.values() for shard in entry["shards"])


def train(
    layer: Sequence[int],
    out: str,
    preset: str | None,
    kind: str,
    n_heads: int | None,
    n_qk: int | None,
    k: int,
    model: str,
    text: Paths,
    dataset: str | None,
    cache: str | None,
    context: int,
    bos: str,
    held_out_tokens: int,
    device: str,
    resume: bool,
    spread: str,
    logger: str,
    **settings: Any,
) -> Answer:
    """Train on activations from disk or on the way, then measure on held-out text; `settings`: of TrainConfig."""
    if cache and (text or dataset):
        raise UserError("A cache brings its own text; give either --cache or --text/--dataset.")
    if preset and not (text or cache):
        dataset = dataset or get_preset(preset).dataset
    folders = {number: Path(out) / f"layer_{number}" if len(layer) > 1 else Path(out) for number in layer}
    how = TrainConfig(**settings)
    with join_world() as world:
        if spread == "layers":
            if world.size > len(layer):
                raise UserError(f"{world.size} processes cannot share {len(layer)} layers; start fewer.")
            layer = layer[world.rank :: world.size]
        language_model = load_model(model, device=device)
        sites = {number: language_model.site(number) for number in layer}
        specs = [
            RunSpec(f"{kind} {number}", number, module_config(site, kind, n_heads, n_qk, k), how, folders[number])
            for number, site in sites.items()
        ]
        for spec in specs:
            store.require_writable(spec.folder)
        if cache:
            sources = _cached_sources(cache, language_model, layer, bos)
        else:
            splits, name = _splits(language_model, text, dataset, how.tokens, held_out_tokens, context, bos, how.seed)
            sources = {
                split: ActivationStream(language_model, sequences, layer, name) for split, sequences in splits.items()
            }
        answers = _train_and_measure(
            specs, sources, language_model, World() if spread == "layers" else world, resume, logger, out
        )
        if spread == "layers":
            answers = world.gather(answers)
    if len(folders) == 1 and answers:
        return {"path": out, **answers[str(layer[0])]}
    return {"path": out, "layers": answers}


def _cached_sources(folder: str, model: LanguageModel, layers: Sequence[int], bos: str) -> dict[str, ActivationCache]:
    """Activations from the disk by split, of the layers, model and BOS policy asked for."""
    policy = None if bos == "auto" else bos
    sources = {"train": ActivationCache(folder, "train", model=model, bos_policy=policy)}
    if missing := sorted(set(layers) - set(sources["train"].layers)):
        raise UserError(f"{folder} holds layers {list(sources['train'].layers)}, not {missing[0]}; cache that layer.")
    if "held_out" in store.read_json(Path(folder) / "manifest.json")["splits"]:
        sources["held_out"] = ActivationCache(folder, "held_out", model=model)
    return sources


def _train_and_measure(
    specs: Sequence[RunSpec],
    sources: Mapping[str, ActivationSource],
    model: LanguageModel,
    world: World,
    resume: bool,
    logger: str,
    out: str,
) -> dict[str, dict[str, float]]:
    """What is measured, by layer. The first process measures, the others return nothing."""
    source, how = sources["train"], specs[0].train
    if source.n_tokens < how.tokens:
        note(f"The text holds {source.n_tokens:,} tokens, so it is read {how.tokens / source.n_tokens:.1f} times.")
    if "held_out" not in sources:
        note("The text is too short to hold a part of it out: results are measured on the training text.")
    if not resume and (sentence := training.cost(specs, source, model)):
        note(sentence)
    log = make_logger(logger, out) if world.rank == 0 else None
    held_out = sources.get("held_out", source)
    measured = training.train(specs, source, held_out, model, resume=resume, logger=log, world=world)
    return {str(spec.layer): measured[spec.name] for spec in specs if spec.name in measured}


# ---- what a trained module does


def evaluate(folder: str, text: Paths, tokens: int, model: str | None, batch_size: int, device: str) -> Answer:
    """Reconstruction and spliced loss on text of the caller's choice."""
    place = Path(folder)
    config, module = _run_config(place), load(folder)
    seed = config.get("train", {}).get("seed", 0)
    language_model, _, sequences = _to_measure_on(place, config, text, tokens, seed, model, device)
    _tell_passes(language_model, sequences, batch_size)
    module.to(language_model.device)
    result = metrics.evaluate(module, config["layer"], language_model, sequences, batch_size, progress=True)
    if (result["fvu"] or 0) > 1:
        note(
            "Warning: FVU is above 1, worse than predicting the mean; "
            "this text or model is probably not what the module was made for."
        )
    return result


def heads(
    folder: str,
    out: str,
    text: Paths,
    tokens: int,
    removed: int,
    seed: int,
    model: str | None,
    batch_size: int,
    device: str,
) -> Answer:
    """Families, scores, logits and contexts of every head."""
    from lorsa_utils.heads import survey

    place, file = Path(folder), Path(out)
    config = _run_config(place)
    if file.suffix != ".parquet":
        raise UserError(f"The table is written as Parquet; give --out a name that ends in .parquet, not {file.name}.")
    lorsa = Lorsa.load(folder)
    store.require_writable(file.parent)
    language_model, documents, sequences = _to_measure_on(place, config, text, tokens, seed, model, device)
    began = time.perf_counter()
    with torch.no_grad():
        description = survey.describe(
            language_model,
            config["layer"],
            lorsa.to(language_model.device),
            sequences,
            [(document.id, document.text) for document in documents],
            removed=removed,
            seed=seed,
            batch_size=batch_size,
        )
    table, discovery = description.table, description.discovery
    with store.atomic_path(file) as temporary:
        table.to_parquet(temporary, index=False)
    for sentence in discovery.skipped.values():
        note(sentence)
    return {
        "path": str(file),
        "heads": len(table),
        "dead_fraction": float(table["dead"].mean()),
        "families": discovery.counts(),
        "skipped": discovery.skipped,
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }


def show(
    folder: str,
    head: Sequence[int],
    out: str,
    table: str | None,
    explanations: str | None,
    sae: str | None,
    transcoder: str | None,
    text: Paths,
    tokens: int,
    seed: int,
    model: str | None,
    batch_size: int,
    device: str,
) -> Answer:
    """Pages of heads."""
    from lorsa_utils.heads import units
    from lorsa_utils.view import pages
    from lorsa_utils.view.evidence import Evidence

    place, target, chosen = Path(folder), Path(out), list(dict.fromkeys(head))
    config, lorsa = _run_config(place), Lorsa.load(folder)
    layer = config["layer"]
    units.LorsaHeads(lorsa).check(chosen)
    is_page = target.suffix in (".html", ".htm")
    if is_page != (len(chosen) == 1):
        fitting = "a file name that ends in .html" if len(chosen) == 1 else "a folder"
        raise UserError(f"For {len(chosen)} page{'s' * (len(chosen) > 1)} give --out {fitting}, not {target.name}.")
    store.require_writable(target.parent if is_page else target)
    beside = {
        "sae": _beside(sae, "sae", layer),
        "transcoder": _beside(transcoder, "transcoder", layer),
        "table": _table_of_heads(table or place / "heads.parquet", required=table is not None),
        "explanations": _explanations(explanations, layer),
    }
    language_model, _, sequences = _to_measure_on(place, config, text, tokens, seed, model, device)
    began = time.perf_counter()
    lorsa.to(language_model.device)
    with torch.no_grad():
        evidence = Evidence.gather(
            language_model, layer, lorsa, sequences, batch_size=batch_size, seed=seed, **beside
        ).heads(chosen)
        if is_page:
            store.write_text(target, pages.head_page(next(evidence)))
            written = [target]
        else:
            written = [*pages.write_pages(evidence, target, chosen).values()]
    answer: Answer = {"path": str(target)} | ({} if is_page else {"pages": [str(path) for path in written]})
    return answer | {"bytes": sum(path.stat().st_size for path in written), "seconds": time.perf_counter() - began}


def _beside(folder: str | None, kind: str, layer: int) -> SAE | None:
    """The SAE or transcoder of the same layer that heads are compared with."""
    if folder is None:
        return None
    module, its_layer = SAE.load(folder), store.read_json(Path(folder) / "config.json").get("layer")
    if module.config.kind != kind or its_layer != layer:
        raise UserError(f"{folder} holds a {module.config.kind} of layer {its_layer}; give a {kind} of layer {layer}.")
    return module


def _explanations(path: str | None, layer: int) -> dict[int, tuple[str | None, float | None]]:
    """Explanations of the Lorsa heads of a layer, each with its detection score where there is one."""
    import pandas as pd

    if path is None:
        return {}
    try:
        scores = pd.read_parquet(path)
        own = scores[(scores["dictionary"] == "Lorsa") & (scores["layer"] == layer) & scores["explanation"].notna()]
        detection = (own["detection"] if "detection" in own else pd.Series(math.nan, index=own.index)).tolist()
        rows = zip(own["unit"].tolist(), own["explanation"].tolist(), detection, strict=True)
        return {int(unit): (str(text), None if math.isnan(score) else float(score)) for unit, text, score in rows}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a table of explanations; make it with `lorsa autointerp`."
        ) from error


def _table_of_heads(path: str | Path, required: bool) -> pd.DataFrame | None:
    """The Parquet table of `lorsa heads`, None when it is not there and need not be."""
    import pandas as pd

    if not required and not Path(path).is_file():
        return None
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table of heads; make it with `lorsa heads`.") from error
    if not {"head", "families"} <= set(table):
        raise UserError(f"{path} is no table of heads; make it with `lorsa heads`.")
    return table


# ---- explanations


def autointerp(
    folders: Sequence[str],
    out: str,
    backend: str,
    units: int,
    judge_model: str | None,
    answers: str | None,
    scorers: Sequence[str],
    yes: bool,
    prices: tuple[float, float] | None,
    concurrency: int,
    text: Paths,
    tokens: int,
    seed: int,
    model: str | None,
    batch_size: int,
    device: str,
) -> Answer:
    """Explanations, scores, tests."""
    from lorsa_utils.autointerp import examples, judges, study

    began = time.perf_counter()
    study.check_scorers(scorers)
    dictionaries, config = _dictionaries(folders)
    place = store.require_writable(out)
    if backend == "openai" and not judge_model:
        raise UserError("The openai backend needs the name of a model; give it with --judge-model.")
    if backend == "replay" and not answers:
        raise UserError("The replay backend needs recorded answers; give an answers.jsonl with --answers.")
    kept = judges.Answers(place / "answers.jsonl" if backend in ("local", "openai") else None)
    with contextlib.closing(kept):
        judge: judges.Judge | None = None
        if backend == "rules":
            judge = judges.RulesJudge()
        elif backend == "replay":
            judge = judges.ReplayJudge(str(answers), judge_model)
        elif backend == "openai":
            judge = judges.OpenAIJudge(str(judge_model), kept, concurrency)
        language_model, _, sequences = _to_measure_on(Path(folders[0]), config, text, tokens, seed, model, device)
        if judge is None:
            own = load_model(judge_model, device=device) if judge_model else language_model
            judge = judges.LocalJudge(own, kept)
        layers = sorted({item.layer for item in dictionaries})
        moved = [item._replace(module=item.module.to(language_model.device)) for item in dictionaries]
        budget, sites = examples.Budget(units=units), {layer: language_model.site(layer) for layer in layers}
        _tell_passes(language_model, sequences, batch_size, passes=1)
        stream = ActivationStream(language_model, sequences, layers)
        tokenizer = language_model.tokenizer
        words, firings = examples.collect(stream, moved, sites, tokenizer, budget, batch_size, seed)
        sets = [examples.examples(firing, words, budget, seed) for firing in firings]
        expected = study.estimate(sets, words, scorers, prices=prices)
        study.confirmed(judge, expected, lambda sentence: _agreed(sentence, yes))
        scores = study.study(sets, words, judge, scorers, seed=seed)
    with store.atomic_path(place / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    tests, outcomes = _tests(scores, {item.name for item in dictionaries}, scorers, seed, place / "tests.csv")
    answer = {
        "path": str(place),
        "judge": judge.name + (" (a proxy: no language model)" if judge.is_proxy else ""),
        "prompts_sha256": judges.prompts_sha256(),
        "unreadable": f"{judge.tally.failed} of {judge.tally.asked} answers",
        "constant": study.constant_answer(sets[0]),
        "scores": _records(study.summary(scores, seed=seed)),
        "tests": tests,
        "outcomes": outcomes,
        "left_out": {f"{item.dictionary.name} {item.dictionary.layer}": item.left_out for item in sets},
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }
    store.write_json(place / "results.json", answer)
    return answer


def _tests(
    scores: pd.DataFrame, names: set[str], scorers: Sequence[str], seed: int, file: Path
) -> tuple[list[Answer], list[Answer]]:
    """Tests of two dictionaries against each other, and how they came out; nothing where no layer has both."""
    from lorsa_utils.autointerp import study

    if len(names) != 2:
        return [], []
    first, second = sorted(names, key=lambda name: name != "Lorsa")
    try:
        tests = study.compare(scores, first, second, scorers, seed)
    except UserError:  # no layer has both
        return [], []
    store.write_text(file, tests.to_csv(index=False))
    return _records(tests), _records(study.outcomes(tests))


def _dictionaries(folders: Sequence[str]) -> tuple[list[Dictionary], dict[str, Any]]:
    """Modules of several run folders that read the same model and text, and the config of the first."""
    from lorsa_utils.autointerp.examples import Dictionary

    dictionaries: list[Dictionary] = []
    configs = [_run_config(Path(folder)) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        module = load(folder)
        if module.config.kind == "transcoder":
            raise UserError(f"{folder} holds a transcoder, which has no source tokens; give Lorsa and SAE runs.")
        name = "Lorsa" if isinstance(module, Lorsa) else "SAE"
        if any((item.name, item.layer) == (name, config["layer"]) for item in dictionaries):
            name = f"{name} {Path(folder).name}"
        dictionaries.append(Dictionary(name, config["layer"], module))
        for key in ("model_sha256", "context", "bos_policy"):
            if config["source"][key] != configs[0]["source"][key]:
                raise UserError(
                    f"{folder} and {folders[0]} differ in {key.removesuffix('_sha256')}; give runs that share it."
                )
    return dictionaries, configs[0]


def _agreed(sentence: str, yes: bool) -> bool:
    """Say a cost, and ask a person unless they have agreed beforehand."""
    note(sentence)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("Nobody is there to confirm the estimate; add --yes to go on without being asked.")
    note("Go on? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- circuits


def circuit(
    folders: Paths,
    nodes: str,
    task: str,
    prompts: str | None,
    layers: Sequence[int] | None,
    metric: str,
    ablation: str,
    pairs: int,
    graph: str | None,
    traced: int,
    out: str | None,
    seed: int,
    model: str | None,
    batch_size: int,
    device: str,
) -> Answer:
    """Accuracy, ranking, faithfulness and completeness, errors, and one prompt's graph."""
    from lorsa_utils.circuits import faithfulness
    from lorsa_utils.circuits import nodes as circuits
    from lorsa_utils.heads import tasks

    began = time.perf_counter()
    for path in filter(None, (graph, out)):
        store.require_writable(Path(path).parent)
    sparse, vocabulary = _sparse_model([Path(folder) for folder in folders or ()], nodes, layers, model, device)
    if prompts:
        pairs_of = tasks.from_texts(vocabulary, Path(prompts).stem, _own_pairs(Path(prompts)))
    else:
        pairs_of = tasks.make(task, vocabulary, max(4, pairs), seed)
    accuracy = tasks.accuracy(circuits.clean_logits(sparse.model, pairs_of, batch_size), pairs_of)
    tasks.require_able(pairs_of.name, accuracy)
    _tell_curves(sparse, pairs_of, batch_size)
    curves = faithfulness.compare(
        {nodes: sparse}, pairs_of, metric, ablation, seed, exact_up_to=FEW_NODES, batch_size=batch_size
    )
    table = faithfulness.curve_table(curves, seed)
    if out:
        store.write_text(out, table.to_csv(index=False))
    discovery, held_out = pairs_of.split()
    instead = circuits.baseline(sparse, held_out, ablation)
    scores = faithfulness.rank_scores(sparse, discovery, metric, ablation, FEW_NODES, batch_size)
    order = faithfulness.ranking(scores, sparse.error_nodes)[:10]
    effects = circuits.effects(sparse, held_out, order, instead, metric, batch_size).mean(dim=1).tolist()
    errors = faithfulness.error_shares(sparse, held_out, instead, metric, batch_size).iloc[-1]
    return {
        "task": pairs_of.name,
        "nodes": nodes,
        "layers": list(sparse.layers),
        "accuracy": accuracy,
        "metric": float(curves[nodes].all.mean()),
        "metric_without_the_layers": float(curves[nodes].none.mean()),
        "error_share": float(errors["errors"]),
        "circuit": [
            {"node": str(sparse.node(node)), "effect": effect} for node, effect in zip(order, effects, strict=True)
        ],
        "curves": _records(table),
        "graph": _graph(graph, sparse, pairs_of, vocabulary, traced) if graph else None,
        "seconds": time.perf_counter() - began,
    }


def _sparse_model(
    folders: Sequence[Path], nodes: str, layers: Sequence[int] | None, model: str | None, device: str
) -> tuple[SparseModel, Vocabulary]:
    """The model with its layers decomposed, and its vocabulary."""
    from lorsa_utils.circuits.nodes import take_apart
    from lorsa_utils.heads.prompts import Vocabulary

    def with_words(bos_policy: str, modules: Any) -> tuple[SparseModel, Vocabulary]:
        tokenizer = language_model.tokenizer
        return take_apart(language_model, modules), Vocabulary(tokenizer, bos_id(tokenizer, bos_policy))

    if not folders:
        if nodes != "mhsa" or not layers:
            raise UserError("No run folder was given; name those of `lorsa train`, or take --nodes mhsa with --layers.")
        language_model = load_model(model or "smollm2", device=device)
        return with_words("auto", layers)
    configs = [_run_config(folder) for folder in folders]
    if len({config["source"]["model_sha256"] for config in configs}) > 1:
        raise UserError("These runs were trained on different models; give runs of one model.")
    layers = [config["layer"] for config in configs]
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise UserError(f"Layer {twice[0]} is given twice; give one run folder for each layer.")
    language_model = _model_of_run(folders[0], configs[0]["source"], model, device)
    bos_policy = configs[0]["source"]["bos_policy"]
    if nodes == "mhsa":
        return with_words(bos_policy, layers)
    modules = {}
    for folder, layer, kind in zip(folders, layers, (config["module"]["kind"] for config in configs), strict=True):
        if kind != nodes:
            raise UserError(f"{folder} holds a {kind}, not a {nodes}; give --nodes or the folder that fits.")
        modules[layer] = load(folder, language_model.device)
    return with_words(bos_policy, modules)


def _own_pairs(path: Path) -> list[dict[str, Any]]:
    """The caller's own prompts."""
    try:
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines ({error}); write one object per line.") from error
    if len(pairs) < 2 or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(
            f"{path} needs at least two pairs, one JSON object per line: half of them rank nodes, half measure."
        )
    return pairs


def _tell_curves(sparse: SparseModel, task: Task, batch_size: int) -> None:
    """Say what the curves cost when that is more than a minute."""
    from lorsa_utils.circuits import nodes as circuits
    from lorsa_utils.circuits.faithfulness import usual_sizes

    batch, everything = task.rows(slice(0, batch_size)), torch.ones(1, sparse.n_nodes, dtype=torch.bool)
    began = time.perf_counter()
    circuits.measure(sparse, batch, everything, circuits.baseline(sparse, batch), batch_size=batch_size)
    passes = 3 * len(usual_sizes(sparse.n_nodes)) + 20
    seconds = (time.perf_counter() - began) / len(batch) * len(task) / 2 * passes
    if seconds > 60:
        note(f"About {passes} passes over {len(task) // 2} prompts: {seconds / 60:.0f} minutes.")


def _graph(path: str, sparse: SparseModel, task: Task, vocabulary: Vocabulary, traced: int) -> Answer:
    """Trace the first prompt and write its graph."""
    from lorsa_utils.circuits import graph
    from lorsa_utils.circuits import nodes as circuits

    first = task.rows(slice(0, 1))
    answers, wrong = ([token for token in side[0].tolist() if token >= 0] for side in (first.answers, first.wrong))
    trace = graph.Trace(sparse, first.clean[0, : int(first.position[0]) + 1], answers, wrong)
    traced_graph = graph.trace_graph(trace, task.name, vocabulary.tokenizer, n_traced=traced, progress=True)
    with torch.no_grad():
        chance = circuits.clean_logits(sparse.model, first).softmax(dim=1)[0, answers].sum()
    graph.write_graph(traced_graph, path, probability=float(chance))
    return {"path": path, "nodes": len(traced_graph.nodes), "links": len(traced_graph.links), **traced_graph.facts}


# ---- other people's weights


def import_(
    source: str,
    folder: str,
    model: str | None,
    layer: int | None,
    text: Paths,
    dataset: str | None,
    tokens: int,
    device: str,
) -> Answer:
    """A run folder from published weights."""
    from lorsa_utils.kit import hub

    if (Path(source) / "checkpoint.json").is_file():
        return {"path": str(hub.unpack(source, folder)), "format": "small", "warning": None}
    if model is None:
        answer = hub.import_checkpoint(source, folder, layer=layer)
    else:
        language_model = load_model(model, device=device)
        corpus, name = _corpus(text, dataset, 10 * tokens)
        documents = [*corpus.train, *corpus.held_out] if text else corpus.held_out or corpus.train

        def sequences(context: int) -> Sequences:
            context = min(context, language_model.context_length)
            return tokenize(documents, language_model.tokenizer, context=context, n_tokens=tokens)

        answer = hub.import_checkpoint(source, folder, language_model, layer, sequences, name)
    if answer["warning"]:
        note(answer["warning"])
    return answer


def export(folder: str, target: str, format: str, push: str | None, path_in_repo: str | None, private: bool) -> Answer:
    """Published formats, and the Hub."""
    from lorsa_utils.kit import hub

    _require_finished(Path(folder))
    if format == "small":
        path = hub.pack(folder, target)
        size = sum(file.stat().st_size for file in path.iterdir())
        answer: Answer = {"path": str(path), "format": "small", "bytes": size}
    else:
        answer = hub.export_checkpoint(folder, target)
    if push:
        answer["url"] = hub.push_to_hub(target, push, path_in_repo, private)
    return answer
