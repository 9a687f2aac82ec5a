"""The explorer in a notebook: a table of heads to sort and filter, any sentence read live, and steering (paper item P5).

What is computed stands in functions that need no widget: `choose_heads`, `Reader`, `steer`. `Explorer` puts ipywidgets
around them; its three panels share the chosen layer, head, sentence and token. Steering changes the layer's output and
nothing else:

    y' = y + (scale - 1) * what the head writes

so that scale 0 removes the head, as in `units.ablate`, and scale 1 leaves the model's own logits, bit for bit.
"""

from __future__ import annotations

import contextlib
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
from lorsa_utils.view.evidence import Context, Place, main_sources, read_context, token_texts

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
    """Rows of a table of heads.

    Args:
        table: of `survey.describe`, or `COLUMNS` of it.
        family: key of a family, "-" for heads without a name, "" for all.
        search: a number of a head, or a piece of a token that it raises.
        order: one of `ORDERS`.
        dead: whether dead heads are shown too.

    Returns:
        the chosen rows, in order.
    """
    chosen = pd.Series(True, index=table.index) if dead else table["frequency"] > 0
    if family:
        names = table["families"] if "families" in table else table["family"]
        chosen &= (names == "") if family == "-" else names.str.split("; ").map(lambda some: family in some)
    if wanted := search.strip():
        found = table["head"].astype(str) == wanted
        if "top_logits" in table and not wanted.isdigit():
            found |= table["top_logits"].map(lambda some: any(wanted.lower() in token.lower() for token in some))
        chosen &= found
    return table[chosen].sort_values([order, "head"], ascending=[ORDERS[order], True], kind="stable")


# ---- sentence


class View(NamedTuple):
    """One layer of the explorer."""

    layer: int
    lorsa: Lorsa
    table: pd.DataFrame
    """One row a head; at least `COLUMNS`."""


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
    """Reads sentences for one layer."""

    def __init__(self, model: LanguageModel, view: View, bos_id: int | None, context: int = 256) -> None:
        """Prepare to read.

        Args:
            model: the language model.
            view: layer and Lorsa.
            bos_id: what every training sequence began with, None without.
            context: longest sentence, in tokens, BOS included.
        """
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
        x = self.model.capture(torch.tensor([kept], device=self.model.device), [self.view.layer])[self.view.layer][0][
            0
        ].float()
        indices, values = (side[0] for side in self.view.lorsa.encode(x[None]))
        values = values * self.norms[indices]
        return Sentence(kept, token_texts(self.model.tokenizer, kept), len(ids) - len(kept), x, indices, values)

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
        """Heads that fire at a token, the most active first: `head`, `family`, `activation`, `looks_at` and `raises`."""
        values, order = sentence.values[position].topk(min(n, len(sentence.values[position])))
        heads = sentence.indices[position][order][values > 0].tolist()
        rows = []
        raised = self.unembedding.top_tokens(self.view.lorsa.W_O[heads], 3).tolist() if heads else []
        for head, activation, tokens in zip(heads, values.tolist(), raised, strict=False):
            z = self.view.lorsa.z_pattern(sentence.x[None], head)[0, position, : position + 1]
            sources = [sentence.tokens[source] for source in main_sources(z)[:2]]
            family = str(self.view.table["family"].iloc[head])
            raises = token_texts_of(self.model.tokenizer, tokens)
            rows.append(
                {"head": head, "family": family, "activation": activation, "looks_at": sources, "raises": raises}
            )
        return pd.DataFrame(rows, columns=["head", "family", "activation", "looks_at", "raises"])


def token_texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Texts of tokens that do not follow each other."""
    return [token_texts(tokenizer, [index])[0] for index in ids]


# ---- steering


def scaled(
    model: LanguageModel, layer: int, lorsa: Lorsa, scales: Mapping[int, float]
) -> contextlib.AbstractContextManager[None]:
    """Inside the context some heads of a layer write `scale` times what they write: 0 removes a head, 1 leaves it.

    Raises:
        UserError: there is no such head.
    """
    removed = {head: 1 - scale for head, scale in scales.items()}
    return ablate(model, {layer: LorsaHeads(lorsa)}, {layer: removed})


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
    """Next-token probabilities before and after some heads are scaled at all tokens.

    Args:
        model: the language model.
        layer: of the heads.
        lorsa: takes raw activations.
        ids: tokens of the sentence.
        scales: head to factor.
        position: the token after which to predict.
        n: most probable tokens to take, before and after.

    Returns:
        one row a token, by the larger of its probabilities: `token`, `before`, `after`.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    place = range(len(ids))[position]
    before = model.logits(tokens, [place])[0, 0].float().softmax(dim=0)
    with scaled(model, layer, lorsa, scales):
        after = model.logits(tokens, [place])[0, 0].float().softmax(dim=0)
    either = torch.maximum(before, after)
    chosen = sorted(
        {*before.topk(n).indices.tolist(), *after.topk(n).indices.tolist()}, key=lambda index: -float(either[index])
    )
    texts = token_texts_of(model.tokenizer, chosen)
    return pd.DataFrame({"token": texts, "before": before[chosen].tolist(), "after": after[chosen].tolist()})


# ---- as HTML

_STYLE = """<style>
.lorsa { font: 14px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--jp-ui-font-color1, #1d1d1f); max-width:
60rem; } .lorsa .line { line-height: 2.4; margin: .3rem 0; overflow-wrap: anywhere; }
.lorsa .t { position: relative; white-space: pre-wrap; unicode-bidi: isolate; border-bottom: 4px solid transparent;
border-radius: 2px; } .lorsa .t.on { color: #1d1d1f; } .lorsa .t.here { outline: 2px solid currentColor; font-weight:
700; } .lorsa .t.plus { border-bottom: 4px solid #0072b2; } .lorsa .t.minus { border-bottom: 4px dashed #9c2f7c; }
.lorsa sup { font-size: .65em; font-weight: 600; }
.lorsa table { border-collapse: collapse; }
.lorsa th, .lorsa td { text-align: left; padding: .1rem .8rem .1rem 0; border: 0; background: none; }
.lorsa td.n, .lorsa th.n { text-align: right; font-variant-numeric: tabular-nums; }
.lorsa .word { font-family: ui-monospace, "DejaVu Sans Mono", monospace; border: 1px solid #999; border-radius: 3px;
padding: 0 .25em; } .lorsa .word { white-space: pre; unicode-bidi: isolate; }
.lorsa .bar { display: inline-block; height: .75em; background: #767676; } .lorsa .bar.after { background: #0072b2; }
.lorsa .soft { opacity: .75; }
.lorsa-mono select, .lorsa-mono pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace !important; font-size:
13px; } </style>"""


def sentence_html(context: Context, position: int) -> str:
    """A sentence, coloured by the head's activation, with the sources of one token underlined."""
    largest = max(float(context.activation.abs().max()), 1e-9)
    z = context.z_pattern[position]
    sources = {source: float(z[source]) for source in main_sources(z)}
    spans = []
    for place, token in enumerate(context.tokens):
        share = abs(float(context.activation[place])) / largest
        classes = ["t", *(["on"] if share else []), *(["here"] if place == position else [])]
        note = ""
        if place in sources:
            classes.append("minus" if sources[place] < 0 else "plus")
            note = f"<sup>{'+' if sources[place] >= 0 else ''}{pages.fixed(sources[place])}</sup>"
        style = f' style="background: rgba(240, 163, 10, {0.15 + 0.85 * share:.2f})"' if share else ""
        spans.append(f'<span class="{" ".join(classes)}"{style}>{pages.text(pages.visible(token))}</span>{note}')
    return f'<p class="line">{"".join(spans)}</p>'


def _rows_html(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table; cells are HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if place in numeric else "" for place in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)) + "</tr>"
        )

    return f"<table>{line(columns, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _firing_html(firing: pd.DataFrame) -> str:
    rows = [
        (
            str(row.head),
            pages.text(_label(row.family)),
            f"{row.activation:.2f}",
            " ".join(map(pages.word, row.looks_at)),
            " ".join(map(pages.word, row.raises)),
        )
        for row in firing.itertuples()
    ]
    return (
        _rows_html(("head", "family", "activation", "looks at", "raises"), rows, (0, 2))
        if rows
        else "<p>No head fires here.</p>"
    )


def _steering_html(changes: pd.DataFrame) -> str:
    largest = max(float(changes[["before", "after"]].max().max()), 1e-9)
    rows = []
    for row in changes.itertuples():
        bars = "".join(
            f'<div><span class="bar {kind}" style="width:{12 * value / largest:.2f}rem"></span></div>'
            for kind, value in (("", row.before), ("after", row.after))
        )
        rows.append(
            (
                pages.word(row.token),
                f"{row.before:.2%}",
                f"{row.after:.2%}",
                f"{row.after - row.before:+.2%}".replace("-", "−"),
                bars,
            )
        )
    return _rows_html(("next token", "before", "after", "change", "before (grey), after (blue)"), rows, (1, 2, 3))


def _label(family: str) -> str:
    return FAMILIES[family].label if family in FAMILIES else family


# ---- explorer


class Explorer:
    """Three panels that share layer, head, sentence and token: `table`, `live` and `steering` are widgets to display.

    Every panel has a static twin (`listed`, `context`, `changes`) with the numbers of what it shows now, for a figure
    beside it.
    """

    def __init__(
        self, model: LanguageModel, views: Sequence[View], sentence: str, bos_id: int | None, context: int = 256
    ) -> None:
        """Build the widgets and show the first state.

        Args:
            model: the language model.
            views: layers to choose from, the first one is shown first.
            sentence: to begin with.
            bos_id: what every training sequence began with, None without.
            context: longest sentence, in tokens.

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
        self.about, self.shown, self.effect = w.HTML(), w.HTML(), w.HTML()
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
        note = "" if len(rows) <= N_LISTED else f", the first {N_LISTED} are listed"
        self.count.value = (
            _STYLE
            + f"<pre>{len(rows):,} of {len(self.view.table):,} heads{note}\n{pages.text(line.format(*columns))}</pre>"
        )
        options = []
        for row in rows.head(N_LISTED).to_dict("records"):
            shares = [
                f"{100 * row[name]:.0f}" if row[name] == row[name] else ""
                for name in ("first_share", "previous_share", "self_share")
            ]
            distance = f"{row['distance']:.0f}" if row["distance"] == row["distance"] else ""
            raises = " ".join(pages.visible(token).strip() for token in row.get("top_logits", [])[:4])
            numbers = (f"{100 * row['frequency']:.2f}", f"{row['max_activation']:.2f}", distance, *shares)
            options.append(
                (line.format(row["head"], _label(row["family"]), *numbers, raises).replace(" ", "\u00a0"), row["head"])
            )
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
            self.shown.value = f'<div class="lorsa"><p>{pages.text(error)}</p></div>'
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
        reader, position = self.readers[self.view.layer], self.token.value
        context = self.context
        parts = [sentence_html(context, position)]
        if self.read.n_cut:
            parts.append(
                f"<p>Only the first {len(self.read.ids)} tokens are read; {self.read.n_cut} more do not fit in the context.</p>"
            )
        activation = float(context.activation[position])
        token = pages.word(self.read.tokens[position])
        state = f"activation {activation:.2f}" if activation else "not active"
        parts.append(f"<p>Head {self.head.value} at {token}: {state}. Most active there:</p>")
        parts.append(_firing_html(reader.firing(self.read, position)))
        self.shown.value = f'{_STYLE}<div class="lorsa">{"".join(parts)}</div>'
        self._steer()

    def _steer(self) -> None:
        active = int((self.context.activation != 0).sum())
        note = f"Head {self.head.value} times {self.scale.value:g}, at the {active} tokens where it is active; next token after "
        token = pages.word(self.read.tokens[self.token.value])
        self.effect.value = f'{_STYLE}<div class="lorsa"><p>{note}{token}</p>{_steering_html(self.changes)}</div>'
