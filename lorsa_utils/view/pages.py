"""Head pages: one self-contained HTML file for each head, without network or server (paper item P5).

The text of every context is in the HTML itself; templates/page.js adds the z pattern of the token under the pointer or
the focus: z_ij = A_ij v_j from the group's attention A, stored in steps of 1/65535, and v. All text from the model goes
through `html.escape` on its way into the page, the embedded JSON holds numbers alone, and a content policy forbids
every request.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
SHOWN_BEFORE, SHOWN_AFTER = 24, 10
"""Tokens around the chosen one that are shown before a context is opened in full; the main sources are shown too."""


PAGES_FILE = "pages.json"
"""In a folder of pages: a list of {file, layer, head, about}."""


def head_page(head: Head, links: Mapping[int, str] | None = None) -> str:
    """The page of one head, as HTML.

    Args:
        head: of `evidence.collect`.
        links: heads that have pages, to relative addresses.
    """
    sections = [_lead(head), _cards(head), _contexts(head), _features(head), _siblings(head, links or {})]
    contexts = {"contexts": [_numbers(context) for context in head.contexts]}
    script = f'<script type="application/json" id="data">{safe_json(contexts)}</script><script>{template("page.js")}</script>'
    title = f"Layer {head.layer}, head {head.head}"
    return document(title, "".join(sections) + '<p id="live" class="sr" aria-live="polite"></p>', script)


def write_pages(heads: Iterable[Head], folder: str | Path, pages: Sequence[int] = ()) -> dict[int, Path]:
    """Write the pages of some heads into a folder, and `PAGES_FILE` with a line about each.

    Args:
        heads: of `evidence.collect`.
        folder: made when missing.
        pages: all heads that get a page here, so that siblings can be linked.

    Returns:
        head to its file.
    """
    target, written, lines = store.require_writable(folder), {}, []
    for head in heads:
        links = {other: page_name(head.layer, other) for other in pages}
        written[head.head] = target / page_name(head.layer, head.head)
        store.write_text(written[head.head], head_page(head, links))
        lines.append({"file": written[head.head].name, "layer": head.layer, "head": head.head, "about": describe(head)})
    store.write_json(target / PAGES_FILE, lines)
    return written


def page_name(layer: int, head: int) -> str:
    """File name of a head's page."""
    return f"layer{layer:02d}_head{head:05d}.html"


# ---- the shell


@functools.cache
def template(name: str) -> str:
    """A file of the package's templates."""
    return (resources.files("lorsa_utils.view") / "templates" / name).read_text(encoding="utf-8")


def document(title: str, main: str, scripts: str = "", policy: str = "default-src 'none'") -> str:
    """A whole page. `main` is HTML, the title is text."""
    rules = f"{policy}; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: 'self' file:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{text(rules)}">
<title>{text(title)}</title><link rel="icon" href="data:,"><style>{template("page.css")}</style></head>
<body>
{main}
{scripts}
</body></html>
"""


def text(value: Any) -> str:
    """Text as HTML."""
    return html.escape(str(value), quote=True)


def safe_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def word(token: str) -> str:
    """A token in a box, white space made visible, in its own writing direction."""
    return f'<span class="word">{text(visible(token))}</span>'


def visible(token: str) -> str:
    """A token with line ends, tabs and other controls as signs; a leading space stays."""
    signs = {"\n": "⏎", "\r": "␍", "\t": "⇥", "": "∅"}
    if token in signs:
        return signs[token]
    if token.isspace():
        return "".join(signs.get(c, "␣" if c == " " else _control(c)) for c in token)
    return "".join(signs.get(c, c) if c.isprintable() or c in signs or c.isspace() else _control(c) for c in token)


def _control(character: str) -> str:
    # Joiners are part of emoji and of Indian and Arabic writing; overrides of direction are nobody's friend.
    return character if character in "\u200c\u200d\ufe0f" else f"⟨U+{ord(character):04X}⟩"


def number(value: float) -> str:
    """A number of three digits or so, with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}".replace("-", "−")


def fixed(value: float) -> str:
    """A number with two decimals and a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share in percent, for a person."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _bar(share: float, kind: str = "") -> str:
    return f'<span class="bar {kind}" style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></span>'


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML; columns in `numeric` are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(f"<{tag}{scope}{_right(place in numeric)}>{cell}</{tag}>" for place, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{line(columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    )


def _right(is_numeric: bool) -> str:
    return ' class="n"' if is_numeric else ""


# ---- what it is


def describe(head: Head) -> str:
    """What the head is, in one sentence or two."""
    where = f"head {head.head} of {head.n_heads} in layer {head.layer} of {head.model}, QK group {head.group}"
    if head.dead:
        return f"A dead head: never among the kept heads of any of {head.n_tokens:,} tokens. It is {where}."
    activity = f"Active at {percent(head.facts['frequency'])} of {head.n_tokens:,} tokens"
    if head.families:
        family = next(family for family in FAMILIES.values() if family.label == head.families[0])
        return f"{family.label[0].upper()}{family.label[1:]} head: {family.meaning}. {activity}; {where}."
    unnamed = "A head without a name" if head.named else "A head whose name was not looked for"
    return f"{unnamed}: {_where_it_looks(head)}. {activity}; {where}."


def _where_it_looks(head: Head) -> str:
    """The most telling of the shares, in words."""
    places = {"the first token": "first_share", "the token before": "previous_share", "the token itself": "self_share"}
    name, share = max(((name, head.facts[key]) for name, key in places.items()), key=lambda pair: pair[1])
    if share >= 0.5:
        return f"it looks mostly at {name}"
    return f"it looks {head.facts['distance']:.0f} tokens back on average"


def _lead(head: Head) -> str:
    parts = [f"<header><h1>Head {head.head} <small>layer {head.layer}, {text(head.model)}</small></h1>"]
    parts.append(f'<p class="lead">{text(describe(head))}</p>')
    if len(head.families) > 1:
        parts.append(f"<p>It earns more names: {text(', '.join(head.families[1:]))}.</p>")
    if head.explanation:
        score = (
            ""
            if head.score is None
            else f' <span class="soft">(balanced accuracy {head.score:.2f}; chance is 0.50)</span>'
        )
        parts.append(f"<p><b>Explanation</b>: {text(head.explanation)}{score}</p>")
    if head.dead:
        parts.append('<p class="warn">There is no text where it is active, so nothing is shown but its weights.</p>')
    return "".join(parts) + "</header><main>"


def _cards(head: Head) -> str:
    cards = [_card("What it writes", _logits(head))]
    if not head.dead:
        cards.insert(0, _card("Where it looks", _looks(head)))
    if head.shares is not None:
        cards.append(_card("Which MHSA heads it comes from", _shares(head.shares)))
    if head.scores:
        cards.append(_card("Scores on unseen prompts", _scores(head)))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(title: str, body: str) -> str:
    return f'<section class="card wide"><h3>{title}</h3>{body}</section>'


def _looks(head: Head) -> str:
    facts = head.facts
    shares = {
        "first token": facts["first_share"],
        "token before": facts["previous_share"],
        "itself": facts["self_share"],
    }
    shares["elsewhere"] = max(0.0, 1 - sum(shares.values()))
    rows = [(name, percent(share), _bar(share)) for name, share in shares.items()]
    rows = [(name, share, f'<div class="barcell">{bar}</div>') for name, share, bar in rows]
    caption = f"Share of the z pattern where active; {facts['distance']:.0f} tokens back on average"
    sizes = f"Activation: {number(facts['mean_activation'])} on average where active, {number(facts['max_activation'])} at most."
    return _table(caption, ("source", "share", ""), rows, (1,)) + f'<p class="soft">{sizes}</p>'


def _logits(head: Head) -> str:
    largest = max(abs(value) for _, value in [*head.raised, *head.lowered]) or 1.0

    def rows(side: Sequence[tuple[str, float]]) -> list[tuple[str, ...]]:
        kind = ["plus", "minus"]
        return [
            (word(token), number(value), f'<div class="barcell">{_bar(abs(value) / largest, kind[value < 0])}</div>')
            for token, value in side
        ]

    columns = ("token", "logit", "")
    raised = _table("Raises most", columns, rows(head.raised), (1,))
    return (
        raised
        + f"<details><summary>What it lowers</summary>{_table('Lowers most', columns, rows(head.lowered), (1,))}</details>"
    )


def _shares(shares: Sequence[float]) -> str:
    order = [
        index for index in sorted(range(len(shares)), key=lambda index: -shares[index])[:9] if shares[index] >= 0.005
    ]
    rows = [
        (f"head {index}", percent(shares[index]), f'<div class="barcell">{_bar(shares[index])}</div>')
        for index in order
    ]
    return _table("Share of what it writes, where it is active", ("MHSA head", "share", ""), rows, (1,))


def _scores(head: Head) -> str:
    notes = {
        "share": "of the z pattern on the predicted source",
        "precision": "active there and not at controls; chance is 0.5",
        "recall": "of the places where the name asks for it",
        "auc": "more active there than at controls; chance is 0.5",
        "logit": "effect on the predicted token",
    }
    rows = [
        (name, *(fixed(values[name]) if name in values else "–" for values in head.scores.values())) for name in notes
    ]
    body = _table(
        "On the half of the prompts that named no head",
        ("", *map(text, head.scores)),
        rows,
        range(1, len(head.scores) + 1),
    )
    meanings = "".join(f"<p><b>{name}</b>: {note}</p>" for name, note in notes.items())
    body += f'<details class="soft"><summary>What these mean</summary>{meanings}</details>'
    if head.effect is not None:
        effect, error = head.effect
        body += f'<p class="soft">Removing this head alone changes the loss on these prompts by {number(effect)} ± {number(error)} nats.</p>'
    return body


# ---- contexts


def _contexts(head: Head) -> str:
    if head.dead:
        return ""
    largest = max(float(head.facts["max_activation"]), 1e-9)
    parts = ['<section id="contexts"><h2>In text</h2>', _controls(largest)]
    groups: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for place, context in enumerate(head.contexts):
        groups[context.place.kind].append(place)
    for kind, members in groups.items():
        if members:
            title, note = KINDS[kind]
            parts.append(f'<h3 id="{kind}">{title}</h3><p class="soft">{note}</p>')
            parts += [_context(head.contexts[member], member, rank, largest) for rank, member in enumerate(members, 1)]
    return "".join(parts) + "</section>"


def _controls(largest: float) -> str:
    return (
        '<p class="soft">Point at a token, or move with the arrow keys, to see where its activation comes from: '
        '<span class="key">solid</span> sources add to it, <span class="key minus">dashed</span> ones take from it. '
        "Each context begins with the token it was chosen for, in bold.</p>"
        '<div class="controls"><fieldset><legend>Draw</legend>'
        '<label><input type="radio" name="draw" value="z" checked> z pattern of this head</label> '
        '<label><input type="radio" name="draw" value="a"> attention of its QK group</label></fieldset>'
        '<label><input type="checkbox" id="whole"> whole contexts</label>'
        f'<span>activation 0 <span class="legend" role="img" aria-label="from pale to strong"></span> {number(largest)}</span></div>'
    )


def _context(context: Context, place: int, rank: int, largest: float) -> str:
    """A context: its text, and an empty table that the script fills."""
    about, where = _title(context, rank), context.place
    table = (
        '<table class="sources"><caption></caption>'
        '<colgroup><col class="token"><col><col class="z"><col class="bars"><col><col class="bars"></colgroup>'
        '<thead><tr><th scope="col">source</th><th scope="col" class="n">back</th><th scope="col" class="n">z</th><td></td>'
        '<th scope="col" class="n">attn</th><td></td></tr></thead>'
        "<tbody></tbody><tfoot></tfoot></table>"
    )
    return (
        f'<figure class="context" data-context="{place}"><figcaption>{about} · text {where.row}, token {where.position}</figcaption>'
        f'<p class="text" role="group" aria-label="{about}">{_spans(context, largest)}</p>{table}</figure>'
    )


def _title(context: Context, rank: int) -> str:
    activation = float(context.activation[context.peak])
    size = f"activation {activation:.2f}" if activation else "not active"
    if context.place.kind == "sample":
        return f"{size}, more than {100 * context.place.rank:.0f} % of its active tokens"
    return f"{rank}. {size}"


def _spans(context: Context, largest: float) -> str:
    """Every token as a span, with the stretches that are hidden at first."""
    shown, parts, hidden = _shown(context), [], 0
    for column, token in enumerate(context.tokens):
        if column not in shown:
            hidden += 1
        elif hidden:
            parts.append(_gap(hidden))
            hidden = 0
        parts.append(_span(context, column, token, largest, column in shown))
    return "".join(parts) + (_gap(hidden) if hidden else "")


def _span(context: Context, column: int, token: str, largest: float, shown: bool) -> str:
    place = column - context.n_before
    if context.positions[column] < 0:
        added_up = context.positions[-1] + 2 - len(context.positions)
        return f'<span class="between{"" if shown else " far"}" data-j="{column}"> ⋯ {added_up} tokens ⋯ </span>'
    classes, style, attributes = ["t"], "", ' role="button" tabindex="-1"' if place >= 0 else ""
    if place >= 0 and (size := abs(float(context.activation[place]))):
        style = f' style="--a:{min(1.0, size / largest):.2f}"'
    if place == context.peak:
        classes.append("peak")
        attributes = ' role="button" tabindex="0"'
    if not shown:
        classes.append("far")
    return f'<span class="{" ".join(classes)}"{style} data-j="{column}"{attributes}>{text(visible(token))}</span>'


def _gap(n: int) -> str:
    return f'<button type="button" class="gap" aria-label="show {n} more tokens">⋯ {n} ⋯</button>'


def _shown(context: Context) -> set[int]:
    """Columns that are shown at first: around the chosen token, and around its main sources."""
    here, n = context.n_before + context.peak, len(context.tokens)
    shown = set(range(max(context.n_before, here - SHOWN_BEFORE), min(n, here + SHOWN_AFTER + 1)))
    place = {position: column for column, position in enumerate(context.positions)}
    for source in context.main_sources:
        position = context.positions[source]
        near = range(position - AROUND[0], position + AROUND[1] + 1) if position > 0 else [position]
        shown |= {place[one] for one in near if one in place and (one >= 0 or position < 0)}
    # A gap of one or two tokens takes more room than they do.
    return shown | {
        column for column in range(n) if {column - 1, column + 1} <= shown or {column - 1, column + 2} <= shown
    }


def _numbers(context: Context) -> dict[str, Any]:
    """What the script needs of a context: attention by rows without the causal zeros, v, and z of the sources added up."""
    n, before = context.attention.shape[0], context.n_before
    kept = torch.arange(len(context.tokens)) < before + torch.arange(1, n + 1)[:, None]
    steps = (context.attention[kept].clamp(0, 1) * 65535).round().to(torch.int32).numpy().astype("<u2")
    between = context.z_pattern[:, 1] if -1 in context.positions else torch.zeros(0)
    return {
        "before": before,
        "peak": context.peak,
        "positions": context.positions,
        "act": _short(context.activation),
        "v": _short(context.v),
        "zb": _short(between),
        "a": base64.b64encode(steps.tobytes()).decode(),
    }


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


# ---- features and siblings


def _features(head: Head) -> str:
    parts = []
    for features, name, what in (
        (head.written_features, "w_o", "features of the SAE on this layer's output, by their write directions"),
        (head.read_features, "w_v", "features of the transcoder on this layer's input, by their read directions"),
    ):
        if features is not None:
            rows = [(str(f.number), fixed(f.cosine), " ".join(map(word, f.tokens))) for f in features]
            parts.append(_card(f"Nearest to {name}", _table(what, ("feature", "cosine", "raises"), rows, (0, 1))))
    return f'<h2>Nearest SAE features</h2><div class="cards">{"".join(parts)}</div>' if parts else ""


def _siblings(head: Head, links: Mapping[int, str]) -> str:
    rows = []
    for row in head.siblings.sort_values(["frequency", "head"], ascending=[False, True]).itertuples():
        name = f'<a href="{text(links[row.head])}">{row.head}</a>' if row.head in links else str(row.head)
        active = percent(row.frequency) if row.frequency else "dead"
        cells = (name, text(row.families), active, fixed(row.cos_o), fixed(row.cos_v), " ".join(map(word, row.tokens)))
        rows.append(cells)
    columns = ("head", "family", "active", "cos w_o", "cos w_v", "raises")
    table = _table(
        "They share one attention pattern; each reads and writes its own direction", columns, rows, (0, 2, 3, 4)
    )
    label = f"Siblings in QK group {head.group}"
    if not rows:
        return "</main>"
    return f'<h2>{label}</h2><div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div></main>'
