"""What the commands of `lorsa` do: a function takes the options declared in `cli` and returns a dict of JSON values.

`lines` in it is what people see in its place; `exit_code` is not shown.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace as Options
from typing import TYPE_CHECKING, Any

import torch

from lorsa_utils import activations, store, training
from lorsa_utils.activations import ActivationCache, ActivationSource, ActivationStream
from lorsa_utils.config import TrainConfig, get_preset
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import hub
from lorsa_utils.layer import Layer, documents_of_run, run_config
from lorsa_utils.lorsa import SAE, Lorsa, read_module_settings
from lorsa_utils.models import LanguageModel, load_model, resolve_device
from lorsa_utils.processes import World, join_world
from lorsa_utils.text import Sequences, Text, load_text, tokenize
from lorsa_utils.training import RunSpec, make_logger, module_config

if TYPE_CHECKING:
    import pandas as pd

    from lorsa_utils.autointerp.judges import Answers, Judge
    from lorsa_utils.circuits.nodes import SparseModel
    from lorsa_utils.heads.tasks import Task

Answer = dict[str, Any]
IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Of those that torchrun started."""
FEW_NODES = 64
"""Up to this many nodes of a circuit are ranked by removing each, more by gradients."""


def note(text: str | None) -> None:
    """Say something on stderr, from the first process only."""
    if text and IS_FIRST_PROCESS:
        print(text, file=sys.stderr, flush=True)


def _records(table: pd.DataFrame) -> list[Answer]:
    """Rows as JSON values; NaN becomes None."""
    return [{key: None if value != value else value for key, value in row.items()} for row in table.to_dict("records")]


# ---- the machine


def doctor(options: Options) -> Answer:
    from lorsa_utils.kit import doctor

    return doctor.report(options.profile, options.preset)


def fetch(options: Options) -> Answer:
    from lorsa_utils.fetch import fetch_embedded_model

    folder = fetch_embedded_model(force=options.force)
    weights = folder / "model.safetensors"
    digest = store.sha256_file(weights)
    if digest != store.read_json(folder / "source.json")["safetensors_sha256"]:
        raise UserError(f"{weights} is damaged (another SHA-256 than when it was made); run `lorsa fetch --force`.")
    return {"path": str(folder), "sha256": digest}


def bench(options: Options) -> Answer:
    from lorsa_utils.kit import bench

    file = Path(options.out or store.data_dir() / "benchmarks.csv")
    store.require_writable(file.parent)
    rows: list[Answer] = []
    for shape in options.shape:
        measured = bench.measure(shape, resolve_device(options.device), options.backend, options.rounds)
        bench.append_rows(measured, file)
        rows += _records(measured)
    return {"file": str(file), "rows": rows}


# ---- the notebooks


def _run_dir(options: Options) -> Path:
    return Path(options.run_dir or store.data_dir() / "runs" / options.profile)


def reproduce(options: Options) -> Answer:
    from lorsa_utils.kit import reproduce

    statuses = reproduce.reproduce(options.profile, options.only, options.force, run_dir=options.run_dir)
    return {
        "profile": options.profile,
        "index": str(_run_dir(options) / "index.html"),
        "notebooks": [vars(status) for status in statuses],
        "exit_code": int(any(status.status == "failed" for status in statuses)),
    }


def claims(options: Options) -> Answer:
    from lorsa_utils.kit import claims, notebook

    folder = _run_dir(options)
    profile = notebook.profile_of_run(folder, options.profile)
    readme = store.CHECKOUT / "README.md"
    rows = claims.publish(folder, profile, readme) if options.publish else claims.of_run(folder, profile)
    lines = {
        f"{row['id']} {row['claim']}": f"{row['verdict']} ({row['our number']})"
        for row in claims.table(rows, profile).to_dict("records")
    }
    count = claims.count(rows)
    return {"count": count, "claims": claims.as_json(rows), "lines": lines | {"all": count}}


# ---- training


def _text(options: Options, model: LanguageModel) -> Text:
    return load_text(
        model,
        options.tokens,
        options.text,
        options.dataset,
        held_out_tokens=options.held_out_tokens,
        context=options.context,
        bos_policy=options.bos,
        seed=options.seed,
    )


def cache(options: Options) -> Answer:
    model = load_model(options.model, device=options.device)
    for layer in options.layers:
        model.site(layer)
    folder = store.require_writable(options.out)
    text = _text(options, model)
    note(text.train.shortfall)
    before, began = _cached(folder, "n_tokens"), time.perf_counter()
    how = {"dtype": options.dtype, "batch_size": options.batch_size, "text": text.train.origin}
    activations.build_cache(model, text.splits(), options.layers, folder, **how)
    seconds = time.perf_counter() - began
    return {
        "path": str(folder),
        "tokens": text.train.n_tokens,
        "held_out_tokens": text.held_out.n_tokens if text.held_out else 0,
        "bytes": _cached(folder, "bytes"),
        "tokens_per_s": (_cached(folder, "n_tokens") - before) / seconds,
        "seconds": seconds,
    }


def _cached(folder: Path, key: str) -> int:
    """Sum of `n_tokens` or `bytes` over the shards listed so far."""
    manifest = folder / "manifest.json"
    splits = store.read_json(manifest)["splits"] if manifest.is_file() else {}
    return sum(shard[key] for entry in splits.values() for shard in entry["shards"])


def train(options: Options) -> Answer:
    if options.cache and (options.text or options.dataset):
        raise UserError("A cache brings its own text; give either --cache or --text/--dataset.")
    if options.preset and not (options.text or options.cache):
        options.dataset = options.dataset or get_preset(options.preset).dataset
    layers, out = options.layer, Path(options.out)
    folders = {layer: out / f"layer_{layer}" if len(layers) > 1 else out for layer in layers}
    with join_world() as world:
        if options.spread == "tokens":
            answers = _train_layers(options, folders, world)
        else:
            if world.size > len(layers):
                raise UserError(f"{world.size} processes cannot share {len(layers)} layers; start fewer.")
            own = {layer: folders[layer] for layer in layers[world.rank :: world.size]}
            answers = world.gather(_train_layers(options, own, World()))
    if len(layers) == 1 and answers:
        return {"path": options.out, **answers[str(layers[0])]}
    return {"path": options.out, "layers": answers}


def _train_layers(options: Options, folders: Mapping[int, Path], world: World) -> dict[str, dict[str, float]]:
    """Measurements by layer; empty in all processes but the first."""
    model = load_model(options.model, device=options.device)
    settings = TrainConfig(**{item.name: getattr(options, item.name) for item in fields(TrainConfig)})
    specs = []
    for layer, folder in folders.items():
        shape = module_config(model.site(layer), options.kind, options.n_heads, options.n_qk, options.k)
        name = f"{options.kind} {layer}"
        specs.append(RunSpec(name, layer, shape, settings, store.require_writable(folder)))
    source, held_out = _sources(options, model, list(folders))
    note(None if options.resume else training.cost(specs, source, model))
    logger = make_logger(options.logger, options.out) if world.rank == 0 else None
    measured = training.train(specs, source, held_out, model, resume=options.resume, logger=logger, world=world)
    return {str(spec.layer): measured[spec.name] for spec in specs if spec.name in measured}


def _sources(
    options: Options, model: LanguageModel, layers: Sequence[int]
) -> tuple[ActivationSource, ActivationSource]:
    train: ActivationSource
    held_out: ActivationSource | None = None
    if options.cache:
        policy = None if options.bos == "auto" else options.bos
        train = ActivationCache(options.cache, "train", model=model, bos_policy=policy)
        if missing := sorted(set(layers) - set(train.layers)):
            raise UserError(f"{options.cache} holds layers {list(train.layers)}, not {missing[0]}; cache that layer.")
        if "held_out" in store.read_json(Path(options.cache) / "manifest.json")["splits"]:
            held_out = ActivationCache(options.cache, "held_out", model=model)
    else:
        text = _text(options, model)
        train = ActivationStream(model, text.train, layers, text.train.origin)
        held_out = ActivationStream(model, text.held_out, layers, text.train.origin) if text.held_out else None
    if train.n_tokens < options.tokens:
        note(f"The text holds {train.n_tokens:,} tokens, so it is read {options.tokens / train.n_tokens:.1f} times.")
    if held_out is None:
        note("The text is too short to hold a part of it out: results are measured on the training text.")
    return train, held_out or train


# ---- what a trained module does


def _layer(options: Options) -> Layer:
    return Layer.from_pretrained(options.folder, options.model, options.device)


def _text_for(layer: Layer, options: Options) -> Sequences:
    """The text of the options, else the held-out part of the module's own, in the run's order without a seed."""
    sequences = layer.text(options.tokens, options.text, getattr(options, "seed", None))
    note(sequences.shortfall)
    return sequences


def _tell_minutes(what: str, times: float, call: Callable[[], object]) -> None:
    """How long a call takes, done that many times."""
    began = time.perf_counter()
    call()
    minutes = times * (time.perf_counter() - began) / 60
    if minutes > 1:
        note(f"{what} {minutes:.0f} minutes.")


def _tell_passes(model: LanguageModel, sequences: Sequences, batch_size: int, passes: int) -> None:
    tokens, mask = next(sequences.batches(batch_size, model.device))
    _tell_minutes(
        f"{'Three passes' if passes == 3 else 'One pass'} of the model over {sequences.n_tokens:,} tokens: about",
        passes * len(sequences.tokens) / len(tokens),
        lambda: float(model.loss(tokens, mask)[0].sum()),  # reading a value waits for the device
    )


def evaluate(options: Options) -> Answer:
    layer = _layer(options)
    sequences = _text_for(layer, options)
    _tell_passes(layer.model, sequences, options.batch_size, 3)
    result = layer.evaluate(sequences, options.batch_size, progress=True)
    if (result["fvu"] or 0) > 1:
        note(
            "Warning: FVU is above 1, worse than predicting the mean; "
            "this text or model is probably not what the module was made for."
        )
    return result


def heads(options: Options) -> Answer:
    from lorsa_utils.heads import survey

    out = Path(options.out)
    if out.suffix != ".parquet":
        raise UserError(f"The table is written as Parquet; give --out a name that ends in .parquet, not {out.name}.")
    store.require_writable(out.parent)
    layer = _layer(options)
    lorsa, sequences = layer.lorsa, _text_for(layer, options)
    documents = [(document.id, document.text) for document in sequences.documents]
    how = {"removed": options.removed, "seed": options.seed, "batch_size": options.batch_size}
    began = time.perf_counter()
    with torch.no_grad():
        seen = survey.describe(layer.model, layer.number, lorsa, sequences, documents, **how)
    with store.atomic_path(out) as temporary:
        seen.table.to_parquet(temporary, index=False)
    for sentence in seen.discovery.skipped.values():
        note(sentence)
    return {
        "path": str(out),
        "heads": len(seen.table),
        "dead_fraction": float(seen.table["dead"].mean()),
        "families": seen.discovery.counts(),
        "skipped": seen.discovery.skipped,
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }


def show(options: Options) -> Answer:
    from lorsa_utils.autointerp import study
    from lorsa_utils.heads import survey
    from lorsa_utils.view import pages
    from lorsa_utils.view.evidence import Evidence

    out, chosen = Path(options.out), list(dict.fromkeys(options.head))
    is_page = out.suffix in (".html", ".htm")
    if is_page != (len(chosen) == 1):
        fitting = "a file name that ends in .html" if len(chosen) == 1 else "a folder"
        raise UserError(f"For {len(chosen)} page{'s' * (len(chosen) > 1)} give --out {fitting}, not {out.name}.")
    number, usual = run_config(options.folder)["layer"], Path(options.folder) / "heads.parquet"
    table = options.table or (usual if usual.is_file() else None)
    how = {
        "sae": _beside(options.sae, "sae", number),
        "transcoder": _beside(options.transcoder, "transcoder", number),
        "table": survey.read_table(table) if table else None,
        "explanations": study.read_explanations(options.explanations, number) if options.explanations else {},
        "batch_size": options.batch_size,
        "seed": options.seed,
    }
    layer = _layer(options)
    lorsa = layer.lorsa
    layer.units.check(chosen)
    store.require_writable(out.parent if is_page else out)
    sequences = _text_for(layer, options)
    began = time.perf_counter()
    evidence = Evidence.gather(layer.model, number, lorsa, sequences, **how).heads(chosen)
    if is_page:
        store.write_text(out, pages.head_page(next(evidence)))
        files = [out]
    else:
        files = [*pages.write_pages(evidence, out, chosen).values()]
    size = sum(file.stat().st_size for file in files)
    listed = {} if is_page else {"pages": [str(file) for file in files]}
    return {"path": str(out), **listed, "bytes": size, "seconds": time.perf_counter() - began}


def _beside(folder: str | None, kind: str, layer: int) -> SAE | None:
    if folder is None:
        return None
    module, its_layer = SAE.load(folder), store.read_json(Path(folder) / "config.json").get("layer")
    if module.config.kind != kind or its_layer != layer:
        raise UserError(f"{folder} holds a {module.config.kind} of layer {its_layer}; give a {kind} of layer {layer}.")
    return module


def _layers(options: Options, shared: Sequence[str]) -> list[Layer]:
    """`shared` is what the sources of the run folders' layers must have in common."""
    folders = options.folders
    sources = [run_config(folder)["source"] for folder in folders]
    for folder, source in zip(folders, sources, strict=True):
        for key in shared:
            if source[key] != sources[0][key]:
                raise UserError(
                    f"{folder} and {folders[0]} differ in {key.removesuffix('_sha256')}; give runs that share it."
                )
    first = Layer.from_pretrained(folders[0], options.model, options.device)
    return [first, *(Layer.from_pretrained(folder, first.model) for folder in folders[1:])]


# ---- explanations


def autointerp(options: Options) -> Answer:
    from lorsa_utils.autointerp import examples, judges, study

    began, seed = time.perf_counter(), options.seed
    study.check_scorers(options.scorers)
    out = store.require_writable(options.out)
    asks = options.backend in ("local", "openai")
    with contextlib.closing(judges.Answers(out / "answers.jsonl" if asks else None)) as answers:
        judge = _judge(options, answers)  # before the model is loaded, as the judge may complain
        layers = _layers(options, ("model_sha256", "context", "bos_policy"))
        model, dictionaries = layers[0].model, _dictionaries(layers)
        if judge is None:
            own = load_model(options.judge_model, device=options.device) if options.judge_model else model
            judge = judges.LocalJudge(own, answers)
        sequences = _text_for(layers[0], options)
        budget, sites = examples.Budget(units=options.units), {layer.number: layer.site for layer in layers}
        _tell_passes(model, sequences, options.batch_size, 1)
        stream = ActivationStream(model, sequences, sorted(sites))
        firings = examples.record_firings(
            stream, dictionaries, sites, model.tokenizer, budget, options.batch_size, seed
        )
        sets = [examples.examples(firing, budget, seed) for firing in firings]
        expected = study.estimate(sets, options.scorers, prices=options.prices)
        study.confirmed(judge, expected, lambda sentence: _agreed(sentence, options.yes))
        scores = study.study(sets, judge, options.scorers, seed=seed)
    with store.atomic_path(out / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    tests: Answer = {"tests": [], "outcomes": []}
    names = sorted({item.name for item in dictionaries}, key=lambda name: name != "Lorsa")
    if len(names) == 2:
        with contextlib.suppress(UserError):  # no layer has both
            table = study.compare_dictionaries(scores, names[0], names[1], options.scorers, seed)
            store.write_text(out / "tests.csv", table.to_csv(index=False))
            tests = {"tests": _records(table), "outcomes": _records(study.outcomes(table))}
    answer = {
        "path": str(out),
        "judge": judge.name + (" (a proxy: no language model)" if judge.is_proxy else ""),
        "prompts_sha256": judges.prompts_sha256(),
        "unreadable": f"{judge.tally.failed} of {judge.tally.asked} answers",
        "constant": study.constant_answer(sets[0]),
        "scores": _records(study.summary(scores, seed=seed)),
        **tests,
        "left_out": {f"{item.dictionary.name} {item.dictionary.layer}": item.left_out for item in sets},
        "n_tokens": sequences.n_tokens,
        "seconds": time.perf_counter() - began,
    }
    store.write_json(out / "results.json", answer)
    return answer


def _judge(options: Options, answers: Answers) -> Judge | None:
    """None for a local model, which is loaded later."""
    from lorsa_utils.autointerp import judges

    if options.backend == "rules":
        return judges.RulesJudge()
    if options.backend == "openai":
        if not options.judge_model:
            raise UserError("The openai backend needs the name of a model; give it with --judge-model.")
        return judges.OpenAIJudge(options.judge_model, answers, options.concurrency)
    if options.backend == "replay":
        if not options.answers:
            raise UserError("The replay backend needs recorded answers; give an answers.jsonl with --answers.")
        return judges.ReplayJudge(options.answers, options.judge_model)
    return None


def _dictionaries(layers: Sequence[Layer]) -> list[Any]:
    """Modules by kind, with the folder's name where a layer has two of a kind."""
    from lorsa_utils.autointerp.examples import Dictionary

    dictionaries: list[Dictionary] = []
    for layer in layers:
        if layer.module.config.kind == "transcoder":
            raise UserError(f"{layer.folder} holds a transcoder, which has no source tokens; give Lorsa and SAE runs.")
        name = "Lorsa" if isinstance(layer.module, Lorsa) else "SAE"
        if any((item.name, item.layer) == (name, layer.number) for item in dictionaries):
            name = f"{name} {Path(str(layer.folder)).name}"
        dictionaries.append(Dictionary(name, layer.number, layer.module))
    return dictionaries


def _agreed(sentence: str, yes: bool) -> bool:
    note(sentence)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("Nobody is there to confirm the estimate; add --yes to go on without being asked.")
    note("Go on? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- circuits


def circuit(options: Options) -> Answer:
    from lorsa_utils.circuits import faithfulness, nodes
    from lorsa_utils.heads import tasks

    began = time.perf_counter()
    for path in filter(None, (options.graph, options.out)):
        store.require_writable(Path(path).parent)
    sparse, task = _sparse_model(options)
    kind, size, how = options.nodes, options.batch_size, (options.metric, options.ablation)
    accuracy = tasks.accuracy(nodes.clean_logits(sparse.model, task, size), task)
    tasks.require_able(task.name, accuracy)
    discovery, held_out = task.split()
    first, nothing = task.rows(slice(0, size)), sparse.mask([])[None]
    passes = 3 * len(faithfulness.usual_sizes(sparse.n_nodes)) + 20
    _tell_minutes(
        f"About {passes} passes over {len(held_out)} prompts:",
        passes * len(held_out) / len(first),
        lambda: nodes.measure(sparse, first, ~nothing, nodes.baseline(sparse, first), batch_size=size),
    )
    curves = faithfulness.compare({kind: sparse}, task, *how, options.seed, exact_up_to=FEW_NODES, batch_size=size)
    table = faithfulness.curve_table(curves, options.seed)
    if options.out:
        store.write_text(options.out, table.to_csv(index=False))
    scores = faithfulness.rank_scores(sparse, discovery, *how, FEW_NODES, size)
    order = faithfulness.ranking(scores, sparse.error_nodes)[:10]
    instead = nodes.baseline(sparse, held_out, options.ablation)
    falls = nodes.effects(sparse, held_out, order, instead, options.metric, size).mean(dim=1).tolist()
    errors = faithfulness.error_shares(sparse, held_out, instead, options.metric, size).iloc[-1]
    return {
        "task": task.name,
        "nodes": kind,
        "layers": list(sparse.layers),
        "accuracy": accuracy,
        "metric": float(curves[kind].all.mean()),
        "metric_without_the_layers": float(curves[kind].none.mean()),
        "error_share": float(errors["errors"]),
        "circuit": [
            {"node": str(sparse.node(node)), "effect": effect} for node, effect in zip(order, falls, strict=True)
        ],
        "curves": _records(table),
        "graph": _graph(options, sparse, task) if options.graph else None,
        "seconds": time.perf_counter() - began,
    }


def _sparse_model(options: Options) -> tuple[SparseModel, Task]:
    from lorsa_utils.circuits.nodes import decompose
    from lorsa_utils.heads import tasks
    from lorsa_utils.heads.prompts import Vocabulary
    from lorsa_utils.text import bos_id

    bos_policy, modules = "auto", options.layers
    if options.folders:
        layers = _layers(options, ("model_sha256",))
        numbers = [layer.number for layer in layers]
        if twice := [number for number in numbers if numbers.count(number) > 1]:
            raise UserError(f"Layer {twice[0]} is given twice; give one run folder for each layer.")
        for layer in layers:
            if options.nodes not in ("mhsa", kind := layer.module.config.kind):
                raise UserError(
                    f"{layer.folder} holds a {kind}, not a {options.nodes}; give --nodes or the folder that fits."
                )
        model, bos_policy = layers[0].model, layers[0].config["source"]["bos_policy"]
        modules = numbers if options.nodes == "mhsa" else {layer.number: layer.module for layer in layers}
    elif options.nodes == "mhsa" and options.layers:
        model = load_model(options.model or "smollm2", device=options.device)
    else:
        raise UserError("No run folder was given; name those of `lorsa train`, or take --nodes mhsa with --layers.")
    sparse = decompose(model, modules)
    vocabulary = Vocabulary(model.tokenizer, bos_id(model.tokenizer, bos_policy))
    if options.prompts:
        return sparse, tasks.from_file(vocabulary, options.prompts)
    return sparse, tasks.make(options.task, vocabulary, max(4, options.pairs), options.seed)


def _graph(options: Options, sparse: SparseModel, task: Task) -> Answer:
    from lorsa_utils.circuits import graph
    from lorsa_utils.circuits.nodes import clean_logits

    first = task.rows(slice(0, 1))
    answers, wrong = ([token for token in side[0].tolist() if token >= 0] for side in (first.answers, first.wrong))
    trace = graph.Trace(sparse, first.clean[0, : int(first.position[0]) + 1], answers, wrong)
    traced = graph.trace_graph(trace, task.name, sparse.model.tokenizer, n_traced=options.traced, progress=True)
    with torch.no_grad():
        chance = clean_logits(sparse.model, first).softmax(dim=1)[0, answers].sum()
    graph.write_graph(traced, options.graph, probability=float(chance))
    return {"path": options.graph, "nodes": len(traced.nodes), "links": len(traced.links), **traced.facts}


# ---- other people's weights


def import_(options: Options) -> Answer:
    measured: tuple[Any, ...] = (None, options.layer)
    if options.model:
        model = load_model(options.model, device=options.device)
        origin = options.dataset or "embedded"
        documents = documents_of_run(options.text, origin, options.tokens)

        def sequences(context: int) -> Sequences:
            context = min(context, model.context_length)
            return tokenize(documents, model.tokenizer, context=context, n_tokens=options.tokens)

        paths = [str(Path(path).absolute()) for path in options.text or ()]
        measured = (model, options.layer, sequences, paths or origin)
    answer = hub.import_checkpoint(options.source, options.folder, *measured)
    note(answer["warning"])
    return answer


def export(options: Options) -> Answer:
    folder = Path(options.folder)
    read_module_settings(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} holds an unfinished run; finish it with `lorsa train ... --resume`.")
    if options.format == "small":
        path = hub.pack(folder, options.target)
        size = sum(file.stat().st_size for file in path.iterdir())
        answer: Answer = {"path": str(path), "format": "small", "bytes": size}
    else:
        answer = hub.export_checkpoint(folder, options.target)
    if options.push:
        answer["url"] = hub.push_to_hub(options.target, options.push, options.path_in_repo, options.private)
    return answer
