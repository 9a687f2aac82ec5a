"""A layer of a model with its trained replacement, for commands, notebooks and scripts."""

from __future__ import annotations

import contextlib
import html
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from lorsa_utils import metrics, store, training
from lorsa_utils.activations import ActivationStream
from lorsa_utils.config import TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa, load, read_module_settings
from lorsa_utils.models import AttentionSite, LanguageModel, load_model, resolve_device
from lorsa_utils.text import Document, Sequences, load_corpus, tokenize

if TYPE_CHECKING:
    from lorsa_utils.heads.units import Units


@dataclass
class Layer:
    """An attention layer and the module that replaces it."""

    model: LanguageModel
    number: int
    module: Lorsa | SAE
    """For raw activations, frozen, on the model's device."""
    folder: Path | None = None
    """Run folder."""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """The folder's config.json."""

    @classmethod
    def from_pretrained(
        cls, source: str | Path, model: LanguageModel | str | None = None, device: str | torch.device = "auto"
    ) -> Layer:
        """Load a module and its model from a run folder, a checkpoint of the kit, or `user/repo:folder` on the Hub.

        `model` is the one that the module was trained on, or its new place if it moved; the folder names it by default.
        A model that is in memory is shared, not loaded again.

        Raises:
            UserError: the folder is not a finished run, does not name its model and layer, or the model is another one.
        """
        from lorsa_utils.kit import hub

        folder = Path(source).expanduser()
        if not folder.is_dir() and ":" in str(source):
            folder = hub.download(source)
        config = run_config(folder)
        model = model_of_run(folder, config["source"], model, device)
        return cls(model, config["layer"], load(folder, model.device), folder, config)

    @property
    def site(self) -> AttentionSite:
        """The attention layer's weights by head."""
        return self.model.site(self.number)

    @cached_property
    def units(self) -> Units:
        """The module's heads or features, see `heads.units`."""
        from lorsa_utils.heads.units import units_of

        return units_of(self.model, self.number, self.module)

    def text(self, n_tokens: int = 50_000, files: Sequence[str | Path] = (), seed: int | None = None) -> Sequences:
        """Sequences from files, or else the held-out part of the module's training text.

        Raises:
            UserError: the run does not name its text, or that text is gone.
        """
        source = self.config["source"]
        documents = documents_of_run(files, source.get("text"), n_tokens)
        seed = self.config.get("train", {}).get("seed", 0) if seed is None else seed
        how = {"context": source["context"], "bos_policy": source["bos_policy"], "seed": seed}
        return tokenize(documents, self.model.tokenizer, n_tokens=n_tokens, **how)

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Tensor:
        """Activations of all units, zero where not selected: [batch, length] to [batch, length, n_units]."""
        x, y = self.model.capture(tokens, [self.number])[self.number]
        indices, values = self.module.encode(self.module.input_from(x, y).to(self.module.b_O))
        return values.new_zeros(*tokens.shape, self.module.n_units).scatter_(-1, indices, values)

    def evaluate(self, text: Sequences | None = None, batch_size: int = 8, progress: bool = False) -> dict[str, Any]:
        """Reconstruction error and the model's loss with the module (`metrics.evaluate`), by default on `text()`."""
        text = self.text() if text is None else text
        return metrics.evaluate(self.module, self.number, self.model, text, batch_size, progress)

    def ablate(self, chosen: Sequence[int] | Mapping[int, float]) -> contextlib.AbstractContextManager[None]:
        """Inside the context the model runs without what these units write; a mapping gives each one's removed share.

        Raises:
            UserError: there is no such unit.
        """
        from lorsa_utils.heads.units import ablate

        return ablate(self.model, {self.number: self.units}, {self.number: chosen})

    def describe(self, text: Sequences | None = None, **options: Any) -> pd.DataFrame:
        """What each head does, one row per head, by default on `text()`; options as in `heads.survey.describe`.

        Raises:
            UserError: the module is not a Lorsa, or none of its heads is ever active on the text.
        """
        from lorsa_utils.heads import survey

        text = self.text() if text is None else text
        documents = [(document.id, document.text) for document in text.documents]
        return survey.describe(self.model, self.number, self.lorsa, text, documents, **options).table

    @property
    def lorsa(self) -> Lorsa:
        """The module, or UserError if it is not a Lorsa."""
        if not isinstance(self.module, Lorsa):
            raise UserError(f"The module of layer {self.number} is a {self.module.config.kind}; give a Lorsa.")
        return self.module

    def show(self, head: int, text: Sequences | None = None, **options: Any) -> HeadPage:
        """The page of one head, by default on `text(20_000)`; a notebook displays it.

        Options are those of `view.evidence.Evidence.gather`; heads.parquet in `folder`, if any, gives names and scores.

        Raises:
            UserError: the module is not a Lorsa, or there is no such head.
        """
        from lorsa_utils.heads import survey
        from lorsa_utils.view import evidence, pages

        text = self.text(20_000) if text is None else text
        table_file = None if self.folder is None else self.folder / "heads.parquet"
        if table_file is not None and table_file.is_file():
            options.setdefault("table", survey.read_table(table_file))
        seen = evidence.Evidence.gather(self.model, self.number, self.lorsa, text, **options)
        return HeadPage(pages.head_page(next(seen.heads([head]))))

    def push_to_hub(self, repo_id: str, folder: str | None = None, private: bool = False) -> str:
        """Upload for Language-Model-SAEs (Llamascopium), with a model card; returns the address.

        Raises:
            UserError: the module is not a Lorsa or has no run folder, or the upload fails.
        """
        from lorsa_utils.kit import hub

        if self.folder is None:
            raise UserError("Only a module that was loaded from a run folder can be uploaded; save and load it first.")
        with tempfile.TemporaryDirectory() as target:
            hub.export_checkpoint(self.folder, target)
            return hub.push_to_hub(target, repo_id, folder, private)


@dataclass(frozen=True)
class HeadPage:
    """A self-contained page about one head."""

    html: str = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the page, which opens offline."""
        store.write_text(path, self.html)
        return Path(path)

    def _repr_html_(self) -> str:
        content = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{content}" style="width: 100%; height: 800px; border: 0"></iframe>'


# ---- run folders


def run_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a run; UserError if it is not finished or does not name its model and layer."""
    read_module_settings(folder)
    if not (Path(folder) / "model.safetensors").is_file():
        raise UserError(f"{folder} holds an unfinished run; finish it with `lorsa train ... --resume`.")
    config: dict[str, Any] = store.read_json(Path(folder) / "config.json")
    if "source" not in config or config.get("layer") is None:
        raise UserError(
            f"{folder} does not say which model and layer it is for; import it again with --model and --layer."
        )
    return config


def model_of_run(
    folder: str | Path, source: Mapping[str, Any], given: LanguageModel | str | None, device: str | torch.device
) -> LanguageModel:
    """The model that a run (`source` in config.json) was trained on, in the same dtype; `given` itself or its place.

    Raises:
        UserError: the model has another tokenizer or other weights.
    """
    # The hash of the weights depends on their dtype, which follows the machine that trained: try this machine's first.
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if resolve_device(device).type == "cuda":
        dtypes = [torch.bfloat16, torch.float32, torch.float16]
    name, revision = (given, None) if given else (source["model"], source["revision"])
    for dtype in dtypes:
        if isinstance(name, LanguageModel):
            model = name
        else:
            model = load_model(name, revision=revision, device=device, dtype=dtype, shared=True)
        if model.tokenizer_fingerprint != source["tokenizer_sha256"]:
            raise UserError(
                f"{model.name} has another tokenizer than the model that {folder} was trained on; "
                "give that model with --model."
            )
        if model.fingerprint == source["model_sha256"]:
            return model
    raise UserError(
        f"{model.name} is not the model that {folder} was trained on ({source['model']}, other weights); "
        "give that one with --model."
    )


def documents_of_run(
    files: Sequence[str | Path] | None, trained_on: str | list[str] | None, n_tokens: int
) -> list[Document]:
    """Documents of `files`, or else the held-out ones of a run's text (`source.text` in config.json).

    Raises:
        UserError: the run does not name its text, or that text is gone.
    """
    if files:
        corpus = load_corpus(files)
        return [*corpus.train, *corpus.held_out]
    if trained_on is None:
        raise UserError("This run does not say which text it was trained on; give a text with --text.")
    if isinstance(trained_on, list):
        if missing := [path for path in trained_on if not Path(path).exists()]:
            raise UserError(f"The run's own text {missing[0]} is no longer there; give a text with --text.")
        corpus = load_corpus(trained_on)
    else:
        corpus = load_corpus(None, None if trained_on == "embedded" else trained_on, max_tokens=10 * n_tokens)
    if not corpus.held_out:
        sentence = "The run's text is too short to hold a part of it out: results are measured on the training text."
        print(sentence, file=sys.stderr)
    return corpus.held_out or corpus.train


# ---- training


def train(
    model: LanguageModel,
    layer: int,
    text: Sequences,
    out: str | Path,
    *,
    kind: Literal["lorsa", "sae", "transcoder"] = "lorsa",
    n_heads: int | None = None,
    n_qk: int | None = None,
    k: int = 64,
    tokens: int | None = None,
    resume: bool = False,
    **settings: Any,
) -> Layer:
    """Train a module on one attention layer; activations are computed on the fly.

    Args:
        text: training sequences, such as `load_text(...).train`.
        out: run folder; `resume` continues the run in it.
        n_heads: heads or features; 8 * d_model by default.
        n_qk: QK groups; about n_heads / d_head by default.
        k: units kept per token.
        tokens: budget; all of `text` once by default.
        **settings: other fields of `TrainConfig`.

    Raises:
        UserError: an impossible setting, a folder that cannot be written, or a loss that is not finite.
    """
    shape = training.module_config(model.site(layer), kind, n_heads, n_qk, k)
    how = TrainConfig(tokens=tokens or text.n_tokens, **settings)
    spec = training.RunSpec(f"{kind} {layer}", layer, shape, how, store.require_writable(out))
    source = ActivationStream(model, text, [layer], text.origin)
    training.train([spec], source, None, model, resume=resume)
    return Layer(model, layer, load(out, model.device), Path(out), run_config(out))
