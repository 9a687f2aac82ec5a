"""Thematic anchors (paper item P10): heads that look far back at words of the text's topic, and what they are good for.

A topic word of a passage is a plain word (a space and at least four letters) that occurs in it at least `LEAST` times
but in at most a `RARE` share of all documents. The prompts made here label the tokens before which a topic word is
about to come back, and name as sources the far earlier occurrences of all topic words of the passage; controls stand
before other words. `families.read`, `families.score` and `units.Removals` work on them as on any family, so that

- topic consistency is the share of a head's z pattern on far topic words, beside the same for as many random earlier
  positions;
- the effect of removing heads is the change of the loss on topic words, beside that on other words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families
from lorsa_utils.heads.prompts import FAR, Passage, PromptSet, Vocabulary
from lorsa_utils.heads.units import Removals, Units
from lorsa_utils.models import LanguageModel

LEAST = 2
RARE = 0.2


def topic_words(
    texts: Sequence[Passage], vocabulary: Vocabulary, least: int = LEAST, rare: float = RARE
) -> list[set[int]]:
    """Topic words of every passage, as token ids.

    Args:
        texts: passages; how rare a word is is counted over their documents.
        vocabulary: of the model.
        least: occurrences in the passage.
        rare: largest share of the documents that have it.
    """
    documents: dict[str, set[int]] = {}
    for passage in texts:
        documents.setdefault(passage.document, set()).update(passage.ids)
    spread = Counter(token for ids in documents.values() for token in ids)
    words = {token for token in vocabulary.words if len(vocabulary.texts[token]) > 4}
    limit = max(1.0, rare * len(documents))
    found = []
    for passage in texts:
        counts = Counter(token for token in passage.ids if token in words)
        found.append({token for token, count in counts.items() if count >= least and spread[token] <= limit})
    return found


def topic_prompts(
    texts: Sequence[Passage],
    vocabulary: Vocabulary,
    n_pairs: int = 48,
    per_passage: int = 8,
    scrambled: bool = False,
    seed: int = 0,
) -> PromptSet:
    """Queries before topic words that occurred more than `FAR` tokens ago, and as many controls before other words of the passage.

    Args:
        texts: passages, long ones: 192 tokens or more.
        vocabulary: of the model.
        n_pairs: passages to use, each a pair of its own.
        per_passage: labelled queries in a passage, at most.
        scrambled: put the first half of each passage in random order: its words stay, its text is lost. Queries are in
            the other half.
        seed: of the choice.

    Raises:
        UserError: no passage has a topic word that comes back.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[int]] = []
    queries: list[tuple[int, int, list[int]]] = []
    for passage, topic in zip(texts, topic_words(texts, vocabulary), strict=True):
        ids, first = vocabulary.start + list(passage.ids), len(vocabulary.start)
        begin = len(ids) // 2
        if scrambled:
            ids = ids[:first] + [int(token) for token in rng.permutation(ids[first:begin])] + ids[begin:]
        far = {i: [j for j in range(max(1, first), i - FAR) if ids[j] in topic] for i in range(begin, len(ids) - 1)}
        labelled = [i for i, sources in far.items() if ids[i + 1] in topic and ids[i + 1] in {ids[j] for j in sources}]
        others = [
            i
            for i in far
            if ids[i + 1] not in topic and ids[i + 1] in vocabulary.texts and vocabulary.texts[ids[i + 1]][0] == " "
        ]
        n = min(len(labelled), len(others), per_passage)
        if n == 0 or len(rows) == n_pairs:
            continue
        queries += [
            (len(rows), labelled[index], far[labelled[index]])
            for index in sorted(rng.choice(len(labelled), n, replace=False))
        ]
        queries += [(len(rows), others[index], []) for index in sorted(rng.choice(len(others), n, replace=False))]
        rows.append(ids)
    if not rows:
        raise UserError(
            "No passage has a topic word that comes back far from where it stood; give more or longer texts."
        )
    length = max(len(row) for row in rows)
    sources = torch.zeros(len(queries), length, dtype=torch.bool)
    for number, (_, _, places) in enumerate(queries):
        sources[number, places] = True
    row, position = (torch.tensor([query[side] for query in queries]) for side in (0, 1))
    tokens = torch.tensor([ids + [ids[-1]] * (length - len(ids)) for ids in rows])
    return PromptSet("thematic_anchor", tokens, row, position, sources.any(dim=1), sources, row, ("text",) * len(rows))


def anchors(
    model: LanguageModel, layer: int, units: Units, found: PromptSet, scrambled: PromptSet | None = None, n: int = 20
) -> pd.DataFrame:
    """The units that look most at far topic words.

    Args:
        model: the language model.
        layer: where the units are.
        units: of any kind.
        found: of `topic_prompts`.
        scrambled: the same, scrambled; adds `scrambled_share`.
        n: how many units.

    Returns:
        one row a unit, the largest share first, among those active at labelled queries of `families.MIN_SUPPORT` passages:
        `unit`, the columns of `families.score`, `random_share` (mass on random earlier positions, as many as there are
        sources) and `p` (see `families.p_values`; for one unit, not corrected for having looked at all).
    """
    reading = families.read(model, layer, {"units": units}, found)["units"]
    table = families.score(reading)
    table["random_share"] = (reading.at_random.sum(dim=0) / reading.total.sum(dim=0)).numpy()
    if scrambled is not None:
        table["scrambled_share"] = families.score(families.read(model, layer, {"units": units}, scrambled)["units"])[
            "share"
        ]
    best = table[table["support"] >= families.MIN_SUPPORT].sort_values("share", ascending=False).head(n)
    best = best.assign(p=families.p_values(reading, best.index.tolist(), 0) if len(best) else [])
    return best.rename_axis("unit").reset_index()


def anchor_effects(
    model: LanguageModel,
    layer: int,
    units: Units,
    chosen: Sequence[int],
    among: Sequence[int],
    found: PromptSet,
    n_draws: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """What removing anchors does to the loss on topic words (`labelled`) and on other words (`controls`), beside random units.

    Args:
        model: the language model.
        layer: where the units are.
        units: of any kind.
        chosen: the anchors.
        among: units that random sets of the same size are drawn from, such as all that are active.
        found: of `topic_prompts`.
        n_draws: random sets.
        seed: of the draws.

    Returns:
        the table of `units.Removals.effects`.
    """
    rng = np.random.default_rng(seed)
    pool = [unit for unit in among if unit not in set(chosen)]
    sets = {"anchors": list(chosen)}
    for draw in range(n_draws):
        sets[f"random {draw + 1}"] = [
            int(unit) for unit in rng.choice(pool, min(len(chosen), len(pool)), replace=False)
        ]
    return Removals(model, layer, found).effects(units, sets)
