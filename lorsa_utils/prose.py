"""Prose from wiki articles and reStructuredText docstrings, as paragraphs of running English.

mwparserfromhell parses wiki markup; this module decides which parts are words of a sentence.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

MIN_DOCUMENTATION_CHARACTERS = 600

# --- wiki markup -----------------------------------------------------------------------------------------------------


# Tables hold what occurs in the one extract that is cleaned.


def _set(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split("; "))


_END_SECTIONS = _set(
    """
    references; external links; see also; further reading; notes; bibliography; footnotes; sources; notes and
    references; gallery; filmography; selected works; publications; awards and nominations; other uses; literature;
    reference literature
    """
)
_DROPPED_TAGS = ("ref", "table", "gallery", "source")
_FIXED = {
    **{"'s": "'s", "'": "'", "nbsp": " ", "spaces": " ", "snd": " – ", "spaced ndash": " – "},
    **{"ndash": "–", "mdashb": "—"},
}
_CONVERT_RANGE = {"-": "to", "–": "to", "and(-)": "and", "to": "to", "and": "and", "by": "by"}
_UNITS = {
    **{"mi": "miles", "km": "kilometres", "m": "metres", "ft": "feet", "in": "inches", "cm": "centimetres"},
    **{"mm": "millimetres", "nmi": "nautical miles", "kg": "kilograms", "g": "grams", "lb": "pounds", "C": "°C"},
    **{"acre": "acres", "ha": "hectares", "m2": "square metres", "m3": "cubic metres"},
    **{"sqmi": "square miles", "km2": "square kilometres"},
}
_COMMON_WORDS = _set(
    """
    the; of; and; to; in; a; is; that; it; for; as; was; with; be; by; on; not; are; this; at; from; or; have; an;
    which; you; were; but; one; all; can; if; has; its; it's; when; will; more; no; other; than; then; into; may;
    these; their; such; only; also; he; his; she; her; they; we; there; been; any; each; both; between; where; used;
    use; using; so; do; does; did; who; what; how; most; some; many; after; before; while; during; about; over; under;
    first; two; new; time; would; could; should; must; same; because
    """
)


def _convert_text(arguments: Sequence[str]) -> str:
    """`{{convert|60|to|170|cm}}` as "60 to 170 centimetres"."""
    words: list[str] = []
    for argument in arguments:
        if re.fullmatch(r"[\d.,/+−-]*\d[\d.,/]*", argument):
            words.append(argument)
        elif argument in _CONVERT_RANGE:
            words.append(_CONVERT_RANGE[argument])
        else:
            return " ".join([*words, _UNITS.get(argument, argument)])
    return " ".join(words)


_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(("nowrap", "small", "smaller", "big", "ipa", "vanchor", "sc", "flag", "vr"), itemgetter(0)),
    **dict.fromkeys(("lang", "script", "transl"), itemgetter(-1)),
    **dict.fromkeys(("frac", "sfrac"), "/".join),
    **dict.fromkeys(("quote", "quotation"), "\n\n{0[0]}\n\n".format),
    "angbr": "⟨{0[0]}⟩".format,
    "chem": "".join,
    "convert": _convert_text,
    "nihongo": lambda texts: f"{texts[0]} ({', '.join(texts[1:3])})",
    "railgauge": lambda texts: re.sub(r"(?<=\d)(?=[a-z])", " ", texts[0]),
}
"""From the arguments of a template that stands for words in a sentence to these words."""


def _template_text(template: Any) -> str:
    name = str(template.name).strip().lower()
    arguments = [_wiki_text(p.value.nodes).strip() for p in template.params if str(p.name).strip().isdigit()]
    if name in _FIXED:
        return _FIXED[name]
    if not arguments:
        return ""
    if name == "as of":
        return f"{'as' if template.has('lc') else 'As'} of {arguments[0]}"
    if name == "val":
        return arguments[0] + (f" × 10^{template.get('e').value}" if template.has("e") else "")
    text_of = itemgetter(0) if name.startswith(("lang-", "ipa-")) else _TEMPLATES.get(name, lambda texts: "")
    return text_of(arguments)


def _wiki_text(nodes: Iterable[Any]) -> str:
    """Words of links and styles stay; references, tables, images and other templates go."""
    from mwparserfromhell import nodes as kinds

    parts: list[str] = []
    for node in nodes:
        if isinstance(node, kinds.Text):
            parts.append(str(node))
        elif isinstance(node, kinds.Wikilink):
            target = str(node.title)
            if not re.match(r"\s*:?[A-Za-z][A-Za-z -]*:\S", target):
                parts.append(_wiki_text(node.text.nodes) if node.text is not None else target)
        elif isinstance(node, kinds.Template):
            parts.append(_template_text(node))
        elif isinstance(node, kinds.HTMLEntity):
            parts.append(str(node.normalize()))
        elif isinstance(node, kinds.ExternalLink):
            parts.append(_wiki_text(node.title.nodes) if node.title is not None else "")
        elif isinstance(node, kinds.Tag):
            parts.append(_tag_text(node))
    return "".join(parts)


def _tag_text(node: Any) -> str:
    name = str(node.tag).lower()
    if name in _DROPPED_TAGS:
        return ""
    if name == "math":
        return f"${' '.join(str(node.contents).split())}$"
    if name in ("li", "dt", "dd"):
        return "\x01"
    return _wiki_text(node.contents.nodes) if node.contents is not None else ""


def wiki_prose(markup: str) -> str:
    """Paragraphs of an article and the headings directly above them, separated by blank lines.

    Tables, references, captions, link sections and lists of fragments go; list items that are sentences stay.
    """
    import mwparserfromhell
    from mwparserfromhell.nodes import Heading

    paragraphs: list[str] = []
    skipped_level = 0
    # Style tags would swallow the headings after an unclosed one; their apostrophes go in `_tidy`.
    for section in mwparserfromhell.parse(markup, skip_style_tags=True).get_sections(flat=True):
        nodes, heading = section.nodes, ""
        if nodes and isinstance(nodes[0], Heading):
            if skipped_level and nodes[0].level > skipped_level:
                continue
            heading = " ".join(_wiki_text(nodes[0].title.nodes).split())
            skipped_level = nodes[0].level if heading.lower() in _END_SECTIONS else 0
            if skipped_level:
                continue
        lines = [text for line in _wiki_text(nodes).split("\n") if (text := _prose_line(line))]
        paragraphs += [heading, *lines] if lines and heading else lines
    return "\n\n".join(paragraphs)


def _prose_line(line: str) -> str:
    item = "\x01" in line[:4]
    text = _tidy(line.replace("\x01", " "))
    words = text.split()
    if len(words) < (12 if item else 8) or not re.search(r"[.!?][\"'”’)]*$", text):
        return ""
    if re.search(r"\||ISBN|https?:", text):
        return ""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return text if letters / len(text) > 0.85 and _is_english(words) else ""


def _is_english(words: Sequence[str]) -> bool:
    """At least every fifth word is a common one, unlike in lists and tables."""
    common = sum(word.lower().strip(".,;:()\"'") in _COMMON_WORDS for word in words)
    return common >= 0.2 * len(words)


def _tidy(text: str) -> str:
    """Close the gaps of removed templates and references."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"\s+", " ", text)
    for _ in range(2):
        text = re.sub(r"([(\[])[\s,;:]+", r"\1", text)
        text = re.sub(r"[\s,;:]+([)\]])", r"\1", text)
        text = re.sub(r"\(\)|\[\]", "", text)
        text = re.sub(r"([,;])(\s*[,;])+", r"\1", text)
    text = re.sub(r"\s+([,;)]|\.(?=\s|$))", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


# --- docstrings ------------------------------------------------------------------------------------------------------


def module_prose(path: Path, seen: set[str]) -> str:
    """Docstring prose of a Python file, in order, or nothing if under 600 characters.

    Paragraphs in `seen` are skipped; new ones are added.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return ""
    paragraphs = dict.fromkeys(text for docstring in _docstrings(tree) for text in docstring_paragraphs(docstring))
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in seen)
    seen.update(paragraphs)
    return text if len(text) >= MIN_DOCUMENTATION_CHARACTERS else ""


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        docstring := ast.get_docstring(node)
    ):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)


_ITEM = re.compile(r"([-*+•]|\d+[.)])\s|\.\.\s|:\w+|>>>")
_UNDERLINE = re.compile(r"([-=~^*+#_.\"'`])\1{2,}")
_PROSE_DIRECTIVES = "note|warning|tip|important|seealso|deprecated|versionadded|versionchanged|hint|caution"
_OTHER_BLOCK = re.compile(rf"\.\. (\[|(?!({_PROSE_DIRECTIVES})::)[\w-]+::)")


def docstring_paragraphs(docstring: str) -> list[str]:
    """Paragraphs of running English in a docstring, one line each, without markup.

    Doctests, code, tables, signatures and one-line parameter entries go; parameter descriptions in sentences stay.
    """
    paragraphs = []
    block: list[str] = []
    start = indent = 0  # depth of the block's first line and of its next ones
    skipped = -1  # lines deeper than this are code or the like
    for line in [*docstring.splitlines(), ""]:
        stripped = line.strip()
        if _UNDERLINE.fullmatch(stripped):
            block = []  # a heading
            continue
        depth = len(line) - len(line.lstrip())
        item = bool(_ITEM.match(stripped))
        if indent < 0 and depth > start:  # the second line of an item says how deep the item is
            indent = depth
        if block and (not stripped or item or depth != indent):
            paragraphs.append(_docstring_prose(block))
            if block[-1].endswith("::") and not block[-1].startswith(".."):
                skipped = start
            block = []
        if not stripped or 0 <= skipped < depth:
            continue
        skipped = depth if _OTHER_BLOCK.match(stripped) else -1
        if skipped < 0:
            start, indent = depth, -1 if item else depth
            block.append(stripped)
    return [paragraph for paragraph in paragraphs if paragraph]


def _docstring_prose(lines: Sequence[str]) -> str:
    if lines[0].startswith((">>>", "...", "|", "+-", "In [", "Out[", "$ ")):
        return ""
    text = " ".join(lines)
    if len(text.split()) < 16 or ". " not in f"{text} ":
        return ""
    text = re.sub(rf"^\.\. ({_PROSE_DIRECTIVES})::\s*[\d.]*\s*", "", text)
    text = re.sub(r"^([-*+•]|\d+[.)])\s+", "", text)
    text = re.sub(r"^(:\w+[^:]*:|`*\*{0,2}\w+`*( \([^)]*\))?:)\s+(?=[A-Z])", "", text)
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)\s*(<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``?([^`]*)``?_{0,2}", r"\1", text)
    text = re.sub(r"(\*\*?)(\w[^*]*)\1", r"\2", text)
    text = re.sub(r"\s*\[[\d, ]+\]_?", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)|(?<!\w)\[~?([A-Za-z_][\w.]*)\]", lambda match: match[1] or match[2], text)
    text = _tidy(text)
    words = text.split()
    if len(words) < 16 or not re.match(r"[A-Z\"'(]", text) or not re.search(r"[.!?][\"')]*$", text):
        return ""
    if re.search(r"::|>>>|https?:|\\[a-z]|[{}|<>=]{2}|_{3}", text):
        return ""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return text if letters / len(text) > 0.9 and _is_english(words) else ""
