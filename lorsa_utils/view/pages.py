"""Head pages: one self-contained, offline HTML file per head (paper item P5).

templates/page.js draws the z pattern of the token under the pointer or the focus: z_ij = A_ij v_j from the group's
attention A, stored in steps of 1/65535, and v. Jinja escapes all text from the model, the embedded JSON holds only
numbers, and a content policy forbids every request.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from lorsa_utils import store
from lorsa_utils.heads.families import FAMILIES
from lorsa_utils.view.evidence import AROUND, Context, Head

KINDS = {
    "top": ("Where it is most active", "The largest activations, each from another text."),
    "sample": (
        "When it is active at all",
        "Active tokens drawn at random, one from each stretch of the range from most to least active.",
    ),
    "random": ("Anywhere", "Tokens drawn at random, the same for every head: most heads are silent at most tokens."),
}
SCORES = {
    "share": "of the z pattern on the predicted source",
    "precision": "active there and not at controls; chance is 0.5",
    "recall": "of the places where the name asks for it",
    "auc": "more active there than at controls; chance is 0.5",
    "logit": "effect on the predicted token",
}
SHOWN_BEFORE, SHOWN_AFTER = 24, 10
"""Tokens around the chosen one that are shown, besides the main sources, before a context is opened in full."""
PAGES_FILE = "pages.json"
"""A list of the pages in its folder: {file, layer, head, about}."""


def head_page(head: Head, links: Mapping[int, str] | None = None) -> str:
    """HTML of one head's page; `links` are addresses of other heads' pages."""
    looks = _looks(head)
    origins = sorted(enumerate(head.shares or []), key=lambda pair: -pair[1])[:9]
    return render(
        "head.html",
        head=head,
        links=links or {},
        lead=describe(head),
        looks=looks | {"elsewhere": max(0.0, 1 - sum(looks.values()))},
        largest_logit=max(abs(value) for _, value in [*head.raised, *head.lowered]) or 1.0,
        origins=[(index, share) for index, share in origins if share >= 0.005],
        scores=SCORES,
        kinds=_kinds(head),
        siblings=list(head.siblings.sort_values(["frequency", "head"], ascending=[False, True]).itertuples()),
        data={"contexts": [_numbers(context) for context in head.contexts]},
    )


def write_pages(heads: Iterable[Head], folder: str | Path, pages: Sequence[int] = ()) -> dict[int, Path]:
    """Write pages into a folder, and `PAGES_FILE` with a line about each; returns head to file.

    `pages` are all heads with a page in this folder, so that siblings can be linked.
    """
    target, written, lines = store.require_writable(folder), {}, []
    for head in heads:
        links = {other: page_name(head.layer, other) for other in pages}
        written[head.head] = file = target / page_name(head.layer, head.head)
        store.write_text(file, head_page(head, links))
        lines.append({"file": file.name, "layer": head.layer, "head": head.head, "about": describe(head)})
    store.write_json(target / PAGES_FILE, lines)
    return written


def page_name(layer: int, head: int) -> str:
    """Of a head's page."""
    return f"layer{layer:02d}_head{head:05d}.html"


# ---- templates


def visible(token: str) -> str:
    """A token with line ends, tabs and other controls as signs; a leading space stays."""
    blank = token.isspace()
    signs = {"\n": "⏎", "\r": "␍", "\t": "⇥"} | ({" ": "␣"} if blank else {})

    def shown(c: str) -> str:
        # Joiners are part of emoji and of Indian and Arabic writing; overrides of direction would mislead.
        plain = c in "\u200c\u200d\ufe0f" or not blank and (c.isprintable() or c.isspace())
        return signs.get(c, c if plain else f"⟨U+{ord(c):04X}⟩")

    return "".join(map(shown, token)) or "∅"


def number(value: float) -> str:
    """Three significant digits, with a true minus sign; a dash if not finite."""
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else "–"


def fixed(value: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lorsa_utils.view"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {"visible": visible, "number": number, "fixed": fixed, "percent": percent}
_TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def render(name: str, **values: Any) -> str:
    """Fill a template of the package; all text is escaped."""
    return _TEMPLATES.get_template(name).render(values)


def macros(name: str) -> Any:
    """The macros of a template, as functions that return HTML."""
    return _TEMPLATES.get_template(name).module


# ---- what it is


def describe(head: Head) -> str:
    """What the head is, in one or two sentences."""
    where = f"head {head.head} of {head.n_heads} in layer {head.layer} of {head.model}, QK group {head.group}"
    if head.dead:
        return f"A dead head: never among the kept heads of any of {head.n_tokens:,} tokens. It is {where}."
    activity = f"Active at {percent(head.facts['frequency'])} of {head.n_tokens:,} tokens"
    if head.families:
        family = next(family for family in FAMILIES.values() if family.label == head.families[0])
        return f"{family.label[0].upper()}{family.label[1:]} head: {family.meaning}. {activity}; {where}."
    unnamed = "A head without a name" if head.named else "A head whose name was not looked for"
    place, share = max(_looks(head).items(), key=lambda pair: pair[1])
    looks = f"mostly at the {place}" if share >= 0.5 else f"{head.facts['distance']:.0f} tokens back on average"
    return f"{unnamed}: it looks {looks}. {activity}; {where}."


def _looks(head: Head) -> dict[str, float]:
    places = {"first token": "first_share", "token before": "previous_share", "token itself": "self_share"}
    return {place: head.facts[key] for place, key in places.items()}


# ---- contexts


def _kinds(head: Head) -> list[dict[str, Any]]:
    largest = max(float(head.facts["max_activation"]), 1e-9)
    kinds = []
    for kind, (title, note) in KINDS.items():
        numbered = [(number, context) for number, context in enumerate(head.contexts) if context.place.kind == kind]
        contexts = [
            {
                "number": number,
                "about": _title(context, rank),
                "place": context.place,
                "pieces": list(_pieces(context, largest)),
            }
            for rank, (number, context) in enumerate(numbered, 1)
        ]
        if contexts:
            kinds.append({"name": kind, "title": title, "note": note, "contexts": contexts})
    return kinds


def _title(context: Context, rank: int) -> str:
    activation = float(context.activation[context.peak])
    size = f"activation {activation:.2f}" if activation else "not active"
    more = f"{size}, more than {100 * context.place.rank:.0f} % of its active tokens"
    return more if context.place.kind == "sample" else f"{rank}. {size}"


def _pieces(context: Context, largest: float) -> Iterator[dict[str, Any]]:
    """Every token of a context and, after each stretch hidden at first, how many tokens it has."""
    shown = _shown(context)
    for far, run in itertools.groupby(range(len(context.tokens)), lambda column: column not in shown):
        columns = list(run)
        for column in columns:
            text, place, size = visible(context.tokens[column]), column - context.n_before, 0.0
            classes = ["t", "peak"] if place == context.peak else ["t"]
            if context.positions[column] < 0:
                text, classes = f" ⋯ {context.positions[-1] + 2 - len(context.positions)} tokens ⋯ ", ["between"]
            elif place >= 0:
                size = abs(float(context.activation[place]))
            yield {
                "hidden": 0,
                "text": text,
                "column": column,
                "style": f"--a:{min(1.0, size / largest):.2f}" if size else "",
                "tab": None if place < 0 else -int(place != context.peak),
                "classes": " ".join([*classes, "far"] if far else classes),
            }
        if far:
            yield {"hidden": len(columns)}


def _shown(context: Context) -> set[int]:
    """Columns shown at first."""
    here, n = context.n_before + context.peak, len(context.tokens)
    shown = set(range(max(context.n_before, here - SHOWN_BEFORE), min(n, here + SHOWN_AFTER + 1)))
    columns = {position: column for column, position in enumerate(context.positions)}
    for source in context.main_sources:
        position = context.positions[source]
        near = range(max(0, position - AROUND[0]), position + AROUND[1] + 1) if position > 0 else [position]
        shown |= {columns[other] for other in near if other in columns}
    # A gap of one or two tokens takes more room than they do.
    return shown | {
        column for column in range(n) if {column - 1, column + 1} <= shown or {column - 1, column + 2} <= shown
    }


def _numbers(context: Context) -> dict[str, Any]:
    """What page.js needs: rows of attention up to the diagonal, v, and z of the added-up sources."""
    n, before = context.attention.shape[0], context.n_before
    kept = torch.arange(len(context.tokens)) < before + torch.arange(1, n + 1)[:, None]
    steps = (context.attention[kept].clamp(0, 1) * 65535).round().to(torch.int32).numpy().astype("<u2")
    between = context.z_pattern[:, 1] if -1 in context.positions else torch.zeros(0)
    sides = {"act": context.activation, "v": context.v, "zb": between}
    return {
        "before": before,
        "peak": context.peak,
        "positions": context.positions,
        **{name: [float(f"{value:.5g}") for value in side.tolist()] for name, side in sides.items()},
        "a": base64.b64encode(steps.tobytes()).decode(),
    }
