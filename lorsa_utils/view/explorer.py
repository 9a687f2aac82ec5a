"""The explorer in a notebook: a table of heads to sort and filter, sentences read live, and steering (paper item P5).

What is computed stands in functions that need no widget: `choose_heads`, `Reader`, `steer`. `Explorer` puts ipywidgets
around them; its three panels share the chosen layer, head, sentence and token. Steering changes the layer's output and
nothing else: y' = y + (scale - 1) * what the head writes, by `units.ablate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.families import FAMILIES
from lorsa_utils.heads.units import LorsaHeads, Unembedding, ablate
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.view import pages
from lorsa_utils.view.evidence import Context, Place, main_sources, read_context, texts_alone, token_texts

if TYPE_CHECKING:
    import ipywidgets

COLUMNS = ("head", "family", "frequency", "max_activation", "distance", "first_share", "previous_share", "self_share")
"""Columns of a table of heads that the explorer shows."""
ORDERS = {"frequency": False, "max_activation": False, "distance": False, "first_share": False, "head": True}
"""By what the table can be sorted, and whether the smallest comes first."""
N_LISTED = 200
"""Rows of the table that are listed at once."""


# ---- table


def choose_heads(
    table: pd.DataFrame, family: str = "", search: str = "", order: str = "frequency", dead: bool = False
) -> pd.DataFrame:
    """Rows of a table of heads, in order.

    Args:
        table: of `survey.describe`, or `COLUMNS` of it.
        family: key of a family, "-" for heads without a name, "" for all.
        search: a number of a head, or a piece of a token that it raises.
        order: one of `ORDERS`.
        dead: whether dead heads are shown too.
    """
    chosen = pd.Series(True, index=table.index) if dead else table["frequency"] > 0
    if family:
        names = table["families"] if "families" in table else table["family"]
        chosen &= (names == "") if family == "-" else names.str.split("; ").map(lambda of_head: family in of_head)
    if text := search.strip():
        matches = table["head"].astype(str) == text
        if "top_logits" in table and not text.isdigit():
            matches |= table["top_logits"].map(lambda raised: any(text.lower() in token.lower() for token in raised))
        chosen &= matches
    return table[chosen].sort_values([order, "head"], ascending=[ORDERS[order], True], kind="stable")


# ---- sentence


class View(NamedTuple):
    """One layer of the explorer."""

    layer: int
    lorsa: Lorsa
    table: pd.DataFrame
    """One row per head; at least `COLUMNS`."""


@dataclass(frozen=True)
class Sentence:
    """A sentence as one layer reads it. Made by `Reader.read`."""

    ids: list[int]
    tokens: list[str]
    n_cut: int
    """Tokens beyond the context, which were left out."""
    x: Tensor = field(repr=False)
    """Attention input, [length, d_model]."""
    indices: Tensor = field(repr=False)
    """Kept heads, [length, k]."""
    values: Tensor = field(repr=False)
    """Their activations times the norm of w_o, [length, k]."""


class Reader:
    """Reads sentences for one layer, at most `context` tokens, with the BOS that training sequences began with."""

    def __init__(self, model: LanguageModel, view: View, bos_id: int | None, context: int = 256) -> None:
        self.model, self.view, self.bos_id, self.context = model, view, bos_id, context
        self.unembedding = Unembedding(model)
        self.norms = view.lorsa.W_O.detach().norm(dim=1)

    @torch.no_grad()
    def read(self, text: str) -> Sentence:
        """Read a sentence; what is beyond the context is cut off.

        Raises:
            UserError: there is no token in it.
        """
        start = [] if self.bos_id is None else [self.bos_id]
        ids = start + self.model.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == len(start):
            raise UserError("There is nothing to read yet; type a sentence.")
        kept = ids[: self.context]
        tokens, layer = torch.tensor([kept], device=self.model.device), self.view.layer
        x = self.model.capture(tokens, [layer])[layer][0].float()
        (indices,), (values,) = self.view.lorsa.encode(x)
        values = values * self.norms[indices]
        return Sentence(kept, token_texts(self.model.tokenizer, kept), len(ids) - len(kept), x[0], indices, values)

    def context_of(self, sentence: Sentence, head: int, position: int) -> Context:
        """The whole sentence as a head sees it, around one token.

        Raises:
            UserError: there is no such head.
        """
        LorsaHeads(self.view.lorsa).check([head])
        kept = (sentence.indices, sentence.values / self.norms[sentence.indices])
        place = Place("sentence", 0.0, 0, position)
        wide = len(sentence.ids)
        return read_context(
            self.view.lorsa, head, sentence.x, kept, sentence.ids, place, self.model.tokenizer, before=wide, after=wide
        )

    @torch.no_grad()
    def firing(self, sentence: Sentence, position: int, n: int = 12) -> pd.DataFrame:
        """Heads that fire at a token, the most active first: `head`, `family`, `activation`, `looks_at`, `raises`."""
        values, order = sentence.values[position].topk(min(n, len(sentence.values[position])))
        heads = sentence.indices[position][order][values > 0].tolist()
        rows = []
        raised = self.unembedding.top_tokens(self.view.lorsa.W_O[heads], 3).tolist() if heads else []
        for head, activation, tokens in zip(heads, values.tolist(), raised, strict=False):
            z = self.view.lorsa.z_pattern(sentence.x[None], head)[0, position, : position + 1]
            sources = [sentence.tokens[source] for source in main_sources(z)[:2]]
            family = str(self.view.table["family"].iloc[head])
            raises = texts_alone(self.model.tokenizer, tokens)
            rows.append(
                {"head": head, "family": family, "activation": activation, "looks_at": sources, "raises": raises}
            )
        return pd.DataFrame(rows, columns=["head", "family", "activation", "looks_at", "raises"])


# ---- steering


@torch.no_grad()
def steer(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    ids: Sequence[int],
    scales: Mapping[int, float],
    position: int = -1,
    n: int = 8,
) -> pd.DataFrame:
    """Next-token probabilities after a token of a sentence, before and after heads are scaled at all tokens.

    Args:
        model: the language model.
        layer: of the heads.
        lorsa: reads raw activations.
        ids: tokens of the sentence.
        scales: head to factor: 0 removes it, 1 leaves it.
        position: the token after which to predict.
        n: how many of the most probable tokens to take before, and how many after.

    Returns:
        one row per token, by the larger of its probabilities: `token`, `before`, `after`.

    Raises:
        UserError: there is no such head.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    place = range(len(ids))[position]
    before = model.logits(tokens, [place])[0, 0].float().softmax(dim=0)
    removed = {head: 1 - scale for head, scale in scales.items()}
    with ablate(model, {layer: LorsaHeads(lorsa)}, {layer: removed}):
        after = model.logits(tokens, [place])[0, 0].float().softmax(dim=0)
    either = torch.maximum(before, after)
    chosen = sorted(
        {*before.topk(n).indices.tolist(), *after.topk(n).indices.tolist()}, key=lambda index: -float(either[index])
    )
    texts = texts_alone(model.tokenizer, chosen)
    return pd.DataFrame({"token": texts, "before": before[chosen].tolist(), "after": after[chosen].tolist()})


# ---- explorer


def marked_tokens(context: Context, position: int) -> list[dict[str, Any]]:
    """Tokens as templates/explorer.html draws them: coloured by activation, with the sources of one token marked."""
    largest = max(float(context.activation.abs().max()), 1e-9)
    z = context.z_pattern[position]
    sources = {source: float(z[source]) for source in main_sources(z)}
    tokens = []
    for place, token in enumerate(context.tokens):
        share = abs(float(context.activation[place])) / largest
        side = "" if place not in sources else "minus" if sources[place] < 0 else "plus"
        marks = ("t", "on" if share else "", "here" if place == position else "", side)
        tokens.append(
            {
                "text": pages.visible(token),
                "classes": " ".join(filter(None, marks)),
                "style": f"background: rgba(240, 163, 10, {0.15 + 0.85 * share:.2f})" if share else "",
                "source": sources.get(place),
            }
        )
    return tokens


def _label(family: str) -> str:
    return FAMILIES[family].label if family in FAMILIES else family


def _whole(value: float) -> str:
    return "" if value != value else f"{value:.0f}"


class Explorer:
    """Three panels that share layer, head, sentence and token: `table`, `live` and `steering` are widgets to display.

    Every panel has a static twin (`listed`, `context`, `changes`) with the numbers of what it shows now, for a figure
    beside it.
    """

    def __init__(
        self, model: LanguageModel, views: Sequence[View], sentence: str, bos_id: int | None, context: int = 256
    ) -> None:
        """Build the widgets and show the first of the layers.

        Raises:
            UserError: ipywidgets is missing, or there is no layer to show.
        """
        if not views:
            raise UserError("There is no layer to explore; train a Lorsa first.")
        try:
            import ipywidgets
        except ImportError as error:
            raise UserError("The explorer needs ipywidgets; run: pip install 'lorsa-utils[notebooks]'") from error
        self.model, self.views = model, {view.layer: view for view in views}
        self.readers = {view.layer: Reader(model, view, bos_id, context) for view in views}
        self._html = pages.macros("explorer.html")
        self._quiet = True  # while widgets change each other
        self._build(ipywidgets, sentence)
        self.head.value = int(self.listed["head"].iloc[0]) if len(self.listed) else 0
        self._list()
        self._read()

    def _build(self, w: Any, sentence: str) -> None:
        wide, style = {"width": "98%", "max_width": "60rem"}, {"description_width": "7rem"}
        families = [("all", ""), *((family.label, key) for key, family in FAMILIES.items()), ("without a name", "-")]
        self.layer = w.Dropdown(options=list(self.views), description="layer", style=style)
        self.family = w.Dropdown(options=families, description="family", style=style)
        self.search = w.Text(
            description="head or token",
            placeholder="1956, or a piece of a token it raises",
            continuous_update=True,
            style=style,
        )
        self.order = w.Dropdown(options=list(ORDERS), description="sort by", style=style)
        self.dead = w.Checkbox(description="dead heads too", indent=False)
        self.count, self.heads = w.HTML(), w.Select(options=[], rows=12, layout=wide, tooltip="heads")
        self.head = w.BoundedIntText(value=0, min=0, max=self.view.lorsa.n_units - 1, description="head", style=style)
        self.sentence = w.Textarea(
            value=sentence, description="sentence", continuous_update=True, layout=wide, style=style
        )
        self.token = w.IntSlider(value=0, min=0, max=0, description="token", layout=wide, style=style)
        self.scale = w.FloatSlider(
            value=0.0,
            min=-4.0,
            max=8.0,
            step=0.5,
            description="scale",
            layout=wide,
            style=style,
            continuous_update=False,
        )
        self.shown, self.effect = w.HTML(), w.HTML()
        self.heads.add_class("lorsa-mono")
        self.count.add_class("lorsa-mono")
        self.table = w.VBox(
            [w.HBox([self.layer, self.family, self.order]), w.HBox([self.search, self.dead]), self.count, self.heads]
        )
        self.live: ipywidgets.Widget = w.VBox([self.sentence, self.token, self.head, self.shown])
        self.steering: ipywidgets.Widget = w.VBox([self.head, self.scale, self.effect])
        for widget in (self.family, self.search, self.order, self.dead):
            widget.observe(lambda _: self._list(), "value")
        self.layer.observe(lambda _: self._change_layer(), "value")
        self.heads.observe(lambda change: self._choose(change["new"]), "value")
        self.sentence.observe(lambda _: self._read(), "value")
        for widget in (self.token, self.head):
            widget.observe(lambda _: self._show(), "value")
        self.scale.observe(lambda _: self._steer(), "value")

    @property
    def view(self) -> View:
        """The chosen layer."""
        return self.views[self.layer.value]

    # What the panels show, as data.

    @property
    def listed(self) -> pd.DataFrame:
        """The chosen rows of the table."""
        return choose_heads(self.view.table, self.family.value, self.search.value, self.order.value, self.dead.value)

    @property
    def context(self) -> Context:
        """The sentence as the chosen head sees it."""
        return self.readers[self.view.layer].context_of(self.read, self.head.value, self.token.value)

    @property
    def changes(self) -> pd.DataFrame:
        """Next-token probabilities before and after, see `steer`."""
        return steer(
            self.model,
            self.view.layer,
            self.view.lorsa,
            self.read.ids,
            {self.head.value: self.scale.value},
            self.token.value,
        )

    # Reactions.

    def _list(self) -> None:
        rows = self.listed
        line = "{:>6}  {:<18} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7}  {}"
        columns = ("head", "family", "active %", "largest", "distance", "first %", "prev %", "self %", "raises")
        self.count.value = self._html.header(len(rows), len(self.view.table), N_LISTED, line.format(*columns))
        options = []
        for row in rows.head(N_LISTED).to_dict("records"):
            shares = [_whole(100 * row[name]) for name in ("first_share", "previous_share", "self_share")]
            raises = " ".join(pages.visible(token).strip() for token in row.get("top_logits", [])[:4])
            numbers = (f"{100 * row['frequency']:.2f}", f"{row['max_activation']:.2f}", _whole(row["distance"]))
            label = line.format(row["head"], _label(row["family"]), *numbers, *shares, raises)
            options.append((label.replace(" ", "\u00a0"), row["head"]))
        chosen = self.head.value
        self._quiet = True
        self.heads.options = options
        self.heads.value = chosen if any(value == chosen for _, value in options) else None
        self._quiet = False
        if self.heads.value is None and options:
            self.heads.value = options[0][1]

    def _choose(self, head: int | None) -> None:
        if head is not None and not self._quiet:
            self.head.value = head

    def _change_layer(self) -> None:
        self.head.max = self.view.lorsa.n_units - 1
        self._list()
        self._read()

    def _read(self) -> None:
        """Read the sentence afresh and look at its last token."""
        try:
            self.read = self.readers[self.view.layer].read(self.sentence.value)
        except UserError as error:
            self.shown.value = self._html.problem(str(error))
            return
        last = len(self.read.ids) - 1
        self._quiet = True
        self.token.max = self.token.value = last
        self._quiet = False
        self._show()

    def _show(self) -> None:
        """The sentence under the chosen head and token, and what fires there."""
        if self._quiet:
            return
        context, position = self.context, self.token.value
        firing = self.readers[self.view.layer].firing(self.read, position)
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
