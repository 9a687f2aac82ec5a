"""The HTML of head pages: everything is there, nothing is code that came as text, nothing asks the network."""

import base64
import dataclasses
import html
import html.parser
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_heads import DEAD, LAYER, Tiny

from lorsa_utils.view import pages
from lorsa_utils.view.evidence import Feature, Head

NASTY = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def many(tiny: Tiny) -> list[Head]:
    return list(tiny.evidence().heads([*range(8), DEAD]))


class Reader(html.parser.HTMLParser):
    """Counts elements, and keeps what scripts hold and which addresses are named."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")], "handlers belong into the script"
        if tag not in ("meta", "link", "input", "col", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def test_a_page_is_one_file_that_asks_nobody(many: list[Head]) -> None:
    for head in (many[0], many[-1]):
        page = pages.head_page(head)
        reader = Reader(page)
        assert {address for address in reader.addresses if not address.startswith("#")} == {"data:,"}
        assert "default-src 'none'" in html.unescape(page)
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)
        assert reader.tags["script"] == 2
        assert len(page.encode()) < 2_000_000
        assert 'lang="en"' in page
        assert "viewport" in page


def test_token_text_stays_text(many: list[Head]) -> None:
    features = [Feature(1, 0.5, [NASTY])]
    contexts = [
        dataclasses.replace(one, tokens=[NASTY if token else "" for token in one.tokens]) for one in many[0].contexts
    ]
    head = dataclasses.replace(
        many[0], model=NASTY, explanation=NASTY, scores={NASTY: {"share": 1.0}},
        raised=[(NASTY, 1.0)], lowered=[(NASTY, -1.0)], written_features=features, read_features=features,
        contexts=contexts,
        siblings=many[0].siblings.assign(families=NASTY, tokens=[[NASTY]] * len(many[0].siblings)),
    )  # fmt: skip
    reader = Reader(pages.head_page(head, {1: f"{NASTY}.html"}))
    assert reader.tags["script"] == 2
    assert "alert(1)" not in "".join(reader.scripts)
    assert reader.text.count(NASTY) > 100


def test_numbers_of_the_script_are_those_of_the_head(many: list[Head]) -> None:
    """The arithmetic of templates/page.js, in Python."""
    head = many[5]
    embedded = json.loads(Reader(pages.head_page(head)).scripts[0])["contexts"]
    assert len(embedded) == len(head.contexts)
    for found, context in zip(embedded, head.contexts, strict=True):
        steps = torch.tensor(np.frombuffer(base64.b64decode(found["a"]), dtype="<u2") / 65535).float()
        before, n, v = found["before"], len(context.activation), torch.tensor(found["v"])
        for i in range(n):
            first, width = i * before + i * (i + 1) // 2, before + i + 1
            a = steps[first : first + width]
            z = a * v[:width]
            if found["zb"]:
                z[1] = found["zb"][i]
            assert torch.allclose(a, context.attention[i, :width], atol=1e-5)
            assert torch.allclose(z, context.z_pattern[i, :width], atol=1e-3)
            assert not context.attention[i, width:].any()
        assert len(steps) == n * before + n * (n + 1) // 2
        assert found["act"] == pytest.approx(context.activation.tolist(), rel=1e-4)


def test_what_a_page_says(many: list[Head]) -> None:
    scores = {"induction": {"share": 0.9, "auc": 0.75, "logit": -0.25}}
    head = dataclasses.replace(
        many[3], families=["induction", "local/positional"], named=True, scores=scores, effect=(0.02, 0.01),
        shares=[0.7, 0.3], explanation="Colours.", score=0.8,
    )  # fmt: skip
    text = " ".join(Reader(pages.head_page(head)).text.split())
    said = ("Induction head: after A B ... A it looks at B", "more names: local/positional", "0.90", "0.75", "−0.25")
    said += ("0.02 ± 0.01 nats", "head 070 %", "Colours.", "balanced accuracy 0.80", "Siblings in QK group 0")
    said += (f"head 3 of 24 in layer {LAYER}",)
    assert not [words for words in said if words not in text]
    dead = Reader(pages.head_page(many[-1])).text
    assert "A dead head: never among the kept heads of any of 2,250 tokens" in dead
    assert "no text where it is active" in dead
    assert "In text" not in dead


def test_contexts_show_the_chosen_token_and_its_sources(many: list[Head]) -> None:
    for context in (context for head in many[:8] for context in head.contexts):
        shown, columns = pages._shown(context), range(len(context.tokens))
        assert {context.n_before + context.peak, *context.main_sources} <= shown
        pieces = list(pages._pieces(context, 1.0))
        spans = [piece for piece in pieces if not piece["hidden"]]
        assert [span["column"] for span in spans] == list(columns)
        assert [span["classes"] for span in spans if span["tab"] == 0] == ["t peak"]
        far = {span["column"] for span in spans if "far" in span["classes"]}
        assert far == set(columns) - shown
        assert sum(piece["hidden"] for piece in pieces) == len(far)


SHOWN = {"\n": "⏎", "  ": "␣␣", " a": " a", "a\tb": "a⇥b", "": "∅", "\u00a0": "⟨U+00A0⟩", "\x00": "⟨U+0000⟩"}
SHOWN |= {"\u202eevil": "⟨U+202E⟩evil"} | {same: same for same in ("👩\u200d🚀", "שלום")}


@pytest.mark.parametrize(("token", "shown"), SHOWN.items())
def test_invisible_characters_become_signs(token: str, shown: str) -> None:
    assert pages.visible(token) == shown


def test_pages_link_to_each_other(many: list[Head], tmp_path: Path) -> None:
    names = [pages.page_name(LAYER, head) for head in range(4, 8)]
    written = pages.write_pages(many[4:8], tmp_path, range(4, 8))
    assert [path.name for path in written.values()] == names
    addresses = Reader(written[4].read_text(encoding="utf-8")).addresses
    assert sorted(address for address in addresses if address.endswith(".html")) == names[1:]
    assert {path.name for path in tmp_path.glob("*.html")} == set(names)
