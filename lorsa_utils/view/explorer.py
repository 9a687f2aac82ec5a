"""The explorer in a notebook: a table of heads to sort and filter, sentences read live, and steering (paper item P5).

`choose_heads` and `View` compute without widgets; `Explorer` puts ipywidgets around them. Steering changes only the
layer's output: y' = y + (scale - 1) * what the head writes, by `units.ablate`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.families import FAMILIES
from lorsa_utils.heads.units import LorsaHeads, ablate
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.view import pages
from lorsa_utils.view.evidence import (
    Context,
    Place,
    Reading,
    Words,
    main_sources,
    read_context,
    texts_alone,
    token_texts,
)

if TYPE_CHECKING:
    import ipywidgets

ORDERS = {"frequency": False, "max_activation": False, "distance": False, "first_share": False, "head": True}
"""What the table can be sorted by, and whether the smallest comes first."""
N_LISTED = 200
"""Rows of the table that are listed at once."""


def choose_heads(
    table: pd.DataFrame, family: str = "", search: str = "", order: str = "frequency", dead: bool = False
) -> pd.DataFrame:
    """Filter and sort a table of `survey.describe`.

    `family` is a key of a family, "-" for heads without a name or "" for all; `search` the number of a head or a piece
    of a token that it raises; `order` one of `ORDERS`.
    """
    chosen = pd.Series(True, index=table.index) if dead else table["frequency"] > 0
    if family:
        names = table["families"]
        chosen &= (names == "") if family == "-" else names.str.split("; ").map(lambda of_head: family in of_head)
    if text := search.strip():
        matches = table["head"].astype(str) == text
        if "top_logits" in table and not text.isdigit():
            matches |= table["top_logits"].map(lambda raised: any(text.lower() in token.lower() for token in raised))
        chosen &= matches
    return table[chosen].sort_values([order, "head"], ascending=[ORDERS[order], True], kind="stable")


@dataclass(frozen=True)
class View:
    """One layer of the explorer; sentences begin with the BOS, if any, that training sequences began with."""

    model: LanguageModel
    layer: int
    lorsa: Lorsa
    """Reads raw activations."""
    table: pd.DataFrame
    """Of `survey.describe`, or `head`, `family`, `families` and the columns of `Survey.facts`."""
    bos_id: int | None = None
    context: int = 256
    """Tokens read at most."""

    @functools.cached_property
    def words(self) -> Words:
        """Tokens that heads raise."""
        return Words(self.model)

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """Read a sentence and cut off what is beyond the context.

        Raises:
            UserError: there is no token in it.
        """
        typed = self.model.tokenizer.encode(text, add_special_tokens=False)
        if not typed:
            raise UserError("There is nothing to read yet; type a sentence.")
        ids = [*([] if self.bos_id is None else [self.bos_id]), *typed]
        read = ids[: self.context]
        tokens = torch.tensor([read], device=self.model.device)
        x = self.model.capture(tokens, [self.layer])[self.layer][0].float()
        (heads,), (activations,) = self.lorsa.encode(x)
        texts = token_texts(self.model.tokenizer, read)
        return Reading(read, texts, x[0], heads, activations, len(ids) - len(read))

    def context_of(self, sentence: Reading, head: int, position: int) -> Context:
        """The whole sentence as a head sees it, around one token.

        Raises:
            UserError: there is no such head.
        """
        LorsaHeads(self.lorsa).check([head])
        place, length = Place("sentence", 0.0, 0, position), len(sentence.ids)
        return read_context(self.lorsa, head, sentence, place, before=length, after=length)

    @torch.no_grad()
    def firing(self, sentence: Reading, position: int, n: int = 12) -> pd.DataFrame:
        """Heads active at a token, the most active first: `head`, `family`, `activation`, `looks_at`, `raises`."""
        heads = sentence.heads[position]
        sizes = sentence.activations[position] * self.lorsa.W_O[heads].norm(dim=1)
        activations, order = sizes.topk(min(n, len(heads)))
        rows = []
        for head, activation in zip(heads[order].tolist(), activations.tolist(), strict=True):
            if activation > 0:
                z = self.lorsa.z_pattern(sentence.x[None], head)[0, position, : position + 1]
                looks_at = [sentence.tokens[source] for source in main_sources(z)[:2]]
                (raised,) = self.words.raised(self.lorsa.W_O[[head]], 3)
                rows.append((head, str(self.table["family"].iloc[head]), activation, looks_at, raised))
        return pd.DataFrame(rows, columns=["head", "family", "activation", "looks_at", "raises"])

    @torch.no_grad()
    def steer(self, ids: Sequence[int], scales: Mapping[int, float], position: int = -1, n: int = 8) -> pd.DataFrame:
        """Next-token probabilities at `position`, before and after heads are scaled at all tokens.

        `scales` maps heads to factors: 0 removes a head, 1 leaves it. The `n` most probable tokens before and after
        have one row each, by the larger probability: `token`, `before`, `after`.

        Raises:
            UserError: there is no such head.
        """
        tokens, place = torch.tensor([list(ids)], device=self.model.device), [range(len(ids))[position]]
        removed = {head: 1 - scale for head, scale in scales.items()}
        before = self.model.logits(tokens, place)[0, 0].float().softmax(dim=0)
        with ablate(self.model, {self.layer: LorsaHeads(self.lorsa)}, {self.layer: removed}):
            after = self.model.logits(tokens, place)[0, 0].float().softmax(dim=0)
        either = torch.maximum(before, after)
        probable = {*before.topk(n).indices.tolist(), *after.topk(n).indices.tolist()}
        chosen = sorted(probable, key=lambda index: -float(either[index]))
        texts = texts_alone(self.model.tokenizer, chosen)
        return pd.DataFrame({"token": texts, "before": before[chosen].tolist(), "after": after[chosen].tolist()})


# ---- explorer


def marked_tokens(context: Context, position: int) -> list[dict[str, Any]]:
    """For templates/explorer.html: tokens coloured by activation, the sources of one token marked."""
    largest, z = max(float(context.activation.abs().max()), 1e-9), context.z_pattern[position]
    sources = {source: float(z[source]) for source in main_sources(z)}
    tokens = []
    for place, token in enumerate(context.tokens):
        share, source = abs(float(context.activation[place])) / largest, sources.get(place)
        side = "" if source is None else "minus" if source < 0 else "plus"
        marks = ("t", "on" if share else "", "here" if place == position else "", side)
        style = f"background: rgba(240, 163, 10, {0.15 + 0.85 * share:.2f})" if share else ""
        classes = " ".join(filter(None, marks))
        tokens.append({"text": pages.visible(token), "classes": classes, "style": style, "source": source})
    return tokens


def _label(family: str) -> str:
    return FAMILIES[family].label if family in FAMILIES else family


class Explorer:
    """Three widgets that share layer, head, sentence and token: `table`, `live` and `steering`.

    `listed`, `context` and `changes` are the numbers they show now.
    """

    def __init__(self, views: Sequence[View], sentence: str) -> None:
        """Build the widgets and show the first layer.

        Raises:
            UserError: ipywidgets is missing, or there is no layer to show.
        """
        if not views:
            raise UserError("There is no layer to explore; train a Lorsa first.")
        try:
            import ipywidgets
        except ImportError as error:
            raise UserError("The explorer needs ipywidgets; run: pip install 'lorsa-utils[notebooks]'") from error
        self.views = {view.layer: view for view in views}
        self._html = pages.macros("explorer.html")
        self._quiet = True  # while widgets change each other
        self._build(ipywidgets, sentence)
        self.head.value = int(self.listed["head"].iloc[0]) if len(self.listed) else 0
        self._list()
        self._read()

    def _build(self, w: Any, sentence: str) -> None:
        style: dict[str, Any] = {"style": {"description_width": "7rem"}}
        wide = {"layout": {"width": "98%", "max_width": "60rem"}}
        families = [("all", ""), *((family.label, key) for key, family in FAMILIES.items()), ("without a name", "-")]
        self.layer = w.Dropdown(options=list(self.views), description="layer", **style)
        self.family = w.Dropdown(options=families, description="family", **style)
        hint = "1956, or a piece of a token it raises"
        self.search = w.Text(description="head or token", placeholder=hint, continuous_update=True, **style)
        self.order = w.Dropdown(options=list(ORDERS), description="sort by", **style)
        self.dead = w.Checkbox(description="dead heads too", indent=False)
        self.heads = w.Select(options=[], rows=12, tooltip="heads", **wide)
        self.head = w.BoundedIntText(value=0, min=0, max=self.view.lorsa.n_units - 1, description="head", **style)
        text = {"value": sentence, "description": "sentence", "continuous_update": True}
        self.sentence = w.Textarea(**text, **wide, **style)
        self.token = w.IntSlider(value=0, min=0, max=0, description="token", **wide, **style)
        scales = {"value": 0.0, "min": -4.0, "max": 8.0, "step": 0.5, "continuous_update": False}
        self.scale = w.FloatSlider(description="scale", **scales, **wide, **style)
        self.count, self.shown, self.effect = w.HTML(), w.HTML(), w.HTML()
        for widget in (self.heads, self.count):
            widget.add_class("lorsa-mono")
        filters = [w.HBox([self.layer, self.family, self.order]), w.HBox([self.search, self.dead])]
        self.table: ipywidgets.Widget = w.VBox([*filters, self.count, self.heads])
        self.live: ipywidgets.Widget = w.VBox([self.sentence, self.token, self.head, self.shown])
        self.steering: ipywidgets.Widget = w.VBox([self.head, self.scale, self.effect])
        for react, *widgets in (
            (self._list, self.family, self.search, self.order, self.dead),
            (self._change_layer, self.layer),
            (self._choose, self.heads),
            (self._read, self.sentence),
            (self._show, self.token, self.head),
            (self._steer, self.scale),
        ):
            for widget in widgets:
                widget.observe(lambda _, react=react: react(), "value")

    @property
    def view(self) -> View:
        """The chosen layer."""
        return self.views[self.layer.value]

    @property
    def listed(self) -> pd.DataFrame:
        """The chosen rows of the table."""
        return choose_heads(self.view.table, self.family.value, self.search.value, self.order.value, self.dead.value)

    @property
    def context(self) -> Context:
        """The sentence as the chosen head sees it."""
        return self.view.context_of(self.read, self.head.value, self.token.value)

    @property
    def changes(self) -> pd.DataFrame:
        """What steering changes, as `View.steer` tells it."""
        return self.view.steer(self.read.ids, {self.head.value: self.scale.value}, self.token.value)

    def _list(self) -> None:
        rows = self.listed
        line = "{:>6}  {:<18} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7}  {}"
        columns = ("head", "family", "active %", "largest", "distance", "first %", "prev %", "self %", "raises")
        self.count.value = self._html.header(len(rows), len(self.view.table), N_LISTED, line.format(*columns))
        options = []
        for row in rows.head(N_LISTED).to_dict("records"):
            shares = [100 * row[name] for name in ("first_share", "previous_share", "self_share")]
            whole = ["" if math.isnan(value) else f"{value:.0f}" for value in (row["distance"], *shares)]
            raises = " ".join(pages.visible(token).strip() for token in row.get("top_logits", [])[:4])
            sizes = (f"{100 * row['frequency']:.2f}", f"{row['max_activation']:.2f}")
            label = line.format(row["head"], _label(row["family"]), *sizes, *whole, raises)
            options.append((label.replace(" ", "\u00a0"), row["head"]))
        chosen = self.head.value
        self._quiet = True
        self.heads.options = options
        self.heads.value = chosen if any(value == chosen for _, value in options) else None
        self._quiet = False
        if self.heads.value is None and options:
            self.heads.value = options[0][1]

    def _choose(self) -> None:
        if self.heads.value is not None and not self._quiet:
            self.head.value = self.heads.value

    def _change_layer(self) -> None:
        self.head.max = self.view.lorsa.n_units - 1
        self._list()
        self._read()

    def _read(self) -> None:
        try:
            self.read = self.view.read(self.sentence.value)
        except UserError as error:
            self.shown.value = self._html.problem(str(error))
            return
        last = len(self.read.ids) - 1
        self._quiet = True
        self.token.max = self.token.value = last
        self._quiet = False
        self._show()

    def _show(self) -> None:
        if self._quiet:
            return
        context, position = self.context, self.token.value
        firing = self.view.firing(self.read, position)
        firing["family"] = firing["family"].map(_label)
        self.shown.value = self._html.live(
            marked_tokens(context, position),
            self.read,
            self.head.value,
            position,
            float(context.activation[position]),
            list(firing.itertuples()),
        )
        self._steer()

    def _steer(self) -> None:
        changes, active = self.changes, int((self.context.activation != 0).sum())
        self.effect.value = self._html.steering(
            self.head.value,
            self.scale.value,
            active,
            self.read.tokens[self.token.value],
            list(changes.itertuples()),
            max(float(changes[["before", "after"]].max().max()), 1e-9),
        )
