"""What pages show of heads: the texts where they are active, what they write, and their neighbours.

For a head h of QK group g, at a query i of one text (paper, Sec. 5):

    activation  z_i * ||w_o||, 0 where h is not among the K kept heads of the token
    z pattern   z_ij = A_ij v_j * ||w_o||; sum_j z_ij is the activation before the selection
    attention   A_ij, which all heads of the group share

A context is a window of text around one token: `top` ones hold the largest activations, `sample` ones an active token
from each stretch of the ordered activations, `random` ones any token, so that silence shows too. Of the sources before
the window, the first token, where attention often rests, and the surroundings of the main ones keep their own columns;
one column adds up the others.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typing_extensions import override

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.families import FAMILIES, SCORES
from lorsa_utils.heads.origins import mhsa_shares
from lorsa_utils.heads.survey import Survey, survey
from lorsa_utils.heads.units import LorsaHeads, Unembedding, mean_head_values
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import LanguageModel, Replacement
from lorsa_utils.text import Sequences

BEFORE, AFTER = 100, 10
"""Tokens of a context before and after the chosen one, as in the authors' interface."""
MAIN_SOURCES, MAIN_SHARE = 4, 0.05
"""A token has at most 4 main sources, each with at least 5 % of its z pattern (in absolute values)."""
AROUND = (8, 3)
"""Tokens kept before and after a main source."""
N_TOP, N_SAMPLES, N_RANDOM = 10, 8, 4
N_TOKENS = 10
"""Tokens that w_o raises and lowers most."""
N_FEATURES = 8
"""Nearest SAE features."""


class Place(NamedTuple):
    """One token of the text, and why it was chosen."""

    kind: str
    """`top`, `sample` or `random`."""
    rank: float
    """For samples, the share of the head's active tokens that are less active; else 0."""
    row: int
    position: int


class Reading(NamedTuple):
    """One text as a Lorsa reads it."""

    ids: list[int]
    tokens: list[str]
    x: Tensor
    """Attention input, [length, d_model]; rows beyond the ids are padding."""
    heads: Tensor
    """Kept ones, [length, k]."""
    activations: Tensor
    """Their z, [length, k]."""
    n_cut: int = 0
    """Tokens left out, beyond the context."""


@dataclass(frozen=True)
class Context:
    """A window of one text as one head sees it: n tokens, m columns of sources."""

    place: Place
    tokens: list[str]
    """[m]; the last n are the window's tokens, "" is the added-up column."""
    positions: list[int]
    """Of the sources in their sequence, [m]; -1 is the added-up column, the second if there is one."""
    peak: int
    """Index of the chosen token in the window."""
    activation: Tensor
    """[n], 0 where the head is not kept."""
    z_pattern: Tensor
    """[n, m], each row sums to the activation before the selection."""
    attention: Tensor
    """[n, m], each row sums to 1."""
    v: Tensor
    """[m], v_j * ||w_o||, so that z_ij = A_ij v_j; 0 for the added-up column."""

    @property
    def n_before(self) -> int:
        """Columns before the window."""
        return len(self.tokens) - len(self.activation)

    @property
    def main_sources(self) -> list[int]:
        """Columns of the chosen token's main sources, the largest first."""
        return main_sources(self.z_pattern[self.peak])


class Feature(NamedTuple):
    """A feature of an SAE near a head."""

    number: int
    cosine: float
    tokens: list[str]
    """That its write direction raises."""


@dataclass(frozen=True)
class Head:
    """One page."""

    model: str
    layer: int
    head: int
    n_heads: int
    group: int
    n_tokens: int
    """Counted tokens of the text that `facts` come from."""
    facts: dict[str, float]
    """Of `Survey.facts`."""
    raised: list[tuple[str, float]]
    """Tokens with the largest logits of w_o, before the last norm's scale."""
    lowered: list[tuple[str, float]]
    contexts: list[Context]
    """`top`, then `sample`, both by activation, then `random`."""
    siblings: pd.DataFrame
    """Other heads of its group: `head`, `families`, `frequency`, `tokens`, and the cosines of write and read directions
    with this head's, `cos_o` and `cos_v`."""
    written_features: list[Feature] | None = None
    """Of `Evidence.sae`, nearest to w_o by write direction."""
    read_features: list[Feature] | None = None
    """Of `Evidence.transcoder`, nearest to w_v by read direction."""
    shares: list[float] | None = None
    """Share of each MHSA head in what this head writes (`origins.mhsa_shares`)."""
    explanation: str | None = None
    score: float | None = None
    """Balanced accuracy of the explanation; chance is 1/2."""
    families: list[str] = field(default_factory=list)
    """Names in words, the most specific first."""
    named: bool = False
    """Whether names were looked for."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Family in words to its scores on unseen prompts."""
    effect: tuple[float, float] | None = None
    """Increase of the loss in nats, on prompts of the first family, when it alone is removed; and standard error."""

    @property
    def dead(self) -> bool:
        """Never active on the text."""
        return self.facts["frequency"] == 0


class ReadOnce(LanguageModel):
    """Remembers what one layer read and wrote outside `splice`, so that a text costs one pass.

    Beyond `limit` bytes, texts are read again.
    """

    def __init__(self, model: LanguageModel, layer: int, limit: int = 1 << 30) -> None:
        vars(self).update(vars(model))
        self._layer, self._room, self._spliced = layer, limit, False
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    @override
    def capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        if list(layers) != [self._layer] or self._spliced:
            return super().capture(tokens, layers)
        keys = [row.long().cpu().numpy().tobytes() for row in tokens]
        pairs = {key: self._known[key] for key in keys if key in self._known}
        if new := [number for number, key in enumerate(keys) if key not in pairs]:
            for number, *sides in zip(new, *super().capture(tokens[new], layers)[self._layer], strict=True):
                x, y = pairs[keys[number]] = sides[0].clone(), sides[1].clone()
                if x.nbytes + y.nbytes <= self._room:
                    self._known[keys[number]] = x, y
                    self._room -= x.nbytes + y.nbytes
        xs, ys = zip(*(pairs[key] for key in keys), strict=True)
        return {self._layer: (torch.stack(xs), torch.stack(ys))}

    @override
    @contextlib.contextmanager
    def splice(self, replacements: Mapping[int, Replacement]) -> Iterator[None]:
        self._spliced = True
        try:
            with super().splice(replacements):
                yield
        finally:
            self._spliced = False


# ---- tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token.

    A character split over several tokens stands at the last of them; the others show their bytes in hexadecimal.
    """
    texts: list[str] = []
    while (first := len(texts)) < len(ids):
        spans = [list(ids[first : first + n]) for n in range(1, min(4, len(ids) - first) + 1)]
        decoded = ((span, tokenizer.decode(span)) for span in spans)
        span, text = next((pair for pair in decoded if "\ufffd" not in pair[1]), (spans[0], None))
        # Other tokens of a byte-level vocabulary stand for bytes.
        pieces = [tokenizer.convert_ids_to_tokens(int(index)) or "" for index in span]
        raw = ["".join(f"⟨{_BYTES[c]:02X}⟩" if c in _BYTES else c for c in piece) for piece in pieces]
        texts += [*raw[:-1], raw[-1] if text is None else text]
    return texts


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def texts_alone(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token on its own; those that pad a vocabulary may have none."""
    return [token_texts(tokenizer, [index])[0] for index in ids]


# ---- places


def choose_places(found: Survey, head: int, sequences: Sequences, seed: int = 0) -> list[Place]:
    """Tokens that a head is shown at. Random ones are the same for all heads."""
    places = [Place("top", 0.0, row, position) for row, position in found.places[head, :N_TOP].tolist() if row >= 0]
    samples = zip(found.samples[head].tolist(), found.sampled[head].tolist(), strict=True)
    drawn = sorted((sample for sample in samples if sample[0] > 0), reverse=True)
    # The middle of each of N_SAMPLES equal stretches of the ordered draws.
    middles = sorted({int((number + 0.5) * len(drawn) / N_SAMPLES) for number in range(N_SAMPLES)}) if drawn else []
    places += [Place("sample", 1 - (number + 0.5) / len(drawn), *drawn[number][1]) for number in middles]
    counted = sequences.mask.nonzero()
    chosen = torch.randperm(len(counted), generator=torch.Generator().manual_seed(seed))[:N_RANDOM]
    return places + [Place("random", 0.0, row, position) for row, position in counted[chosen].tolist()]


@torch.no_grad()
def read_context(
    lorsa: Lorsa, head: int, reading: Reading, place: Place, before: int = BEFORE, after: int = AFTER
) -> Context:
    """A head on the text from `before` tokens before a place to `after` tokens after it."""
    start, end = max(0, place.position - before), min(place.position + after + 1, len(reading.ids))
    window, x, norm = slice(start, end), reading.x, lorsa.W_O[head].norm()
    attention = lorsa.attention_pattern(x[None], head // lorsa.config.group_size)[0, window, :end]
    v = (x[:end] @ lorsa.W_V[head] + lorsa.b_V[head]) * norm
    z = attention * v
    activation = ((reading.heads[window] == head) * reading.activations[window]).sum(dim=-1) * norm
    main = [source for source in main_sources(z[place.position - start]) if 0 < source < start]
    around = {near for source in main for near in range(source - AROUND[0], source + AROUND[1] + 1)}
    apart = sorted(({0} | around) & set(range(start)))
    added_up = sorted(set(range(start)) - set(apart))
    columns = [*apart[:1], *([-1] if added_up else []), *apart[1:], *range(start, end)]

    def folded(sides: Tensor) -> Tensor:
        # Column -1 of what is put together adds up the others.
        return torch.cat([sides, sides[:, added_up].sum(dim=1, keepdim=True)], dim=1)[:, columns].cpu()

    return Context(
        place,
        ["" if column < 0 else reading.tokens[column] for column in columns],
        columns,
        place.position - start,
        activation.cpu(),
        folded(z),
        folded(attention),
        torch.cat([v, v.new_zeros(1)])[columns].cpu(),
    )


def main_sources(z: Tensor) -> list[int]:
    """Main sources in a row of a z pattern [m], the largest first."""
    sizes = z.abs()
    order = sizes.argsort(descending=True)[:MAIN_SOURCES].tolist()
    return [source for source in order if float(sizes[source]) >= MAIN_SHARE * float(sizes.sum()) > 0]


# ---- heads


@dataclass(frozen=True)
class Evidence:
    """What is known of one layer's heads."""

    model: LanguageModel
    layer: int
    lorsa: Lorsa
    """Reads raw activations."""
    sequences: Sequences
    survey: Survey
    table: pd.DataFrame | None = None
    """Names and scores from `survey.describe`, one row per head."""
    shares: Tensor | None = None
    """[n_heads, n_mhsa_heads], from `origins.mhsa_shares`."""
    sae: SAE | None = None
    """On the layer's output."""
    transcoder: SAE | None = None
    """On the layer's input."""
    explanations: Mapping[int, tuple[str | None, float | None]] = field(default_factory=dict)
    """Head to its explanation and score."""
    batch_size: int = 8
    seed: int = 0
    progress: bool = True

    @classmethod
    def gather(cls, model: LanguageModel, layer: int, lorsa: Lorsa, sequences: Sequences, **options: Any) -> Self:
        """With what every head does on the text and which MHSA heads it comes from; `options` are other fields."""
        model = model if isinstance(model, ReadOnce) else ReadOnce(model, layer)
        reading = {key: options[key] for key in ("batch_size", "progress") if key in options}
        found = survey(model, layer, LorsaHeads(lorsa), sequences, seed=options.get("seed", 0), **reading)
        with torch.no_grad():
            x = model.capture(sequences.tokens[:32].long(), [layer])[layer][0].float()
            mean = mean_head_values(model.site(layer), x, sequences.mask[:32].to(x.device))
            shares = mhsa_shares(model, layer, lorsa, mean, sequences, **reading).shares
        return cls(model, layer, lorsa, sequences, found, shares=shares, **options)

    def __post_init__(self) -> None:
        """Check that all is of one module and text.

        Raises:
            UserError: one is not.
        """
        n_heads, d_model = self.lorsa.n_units, self.lorsa.config.d_model
        if len(self.survey.facts) != n_heads or int(self.survey.places[..., 0].max()) >= len(self.sequences.tokens):
            raise UserError("This survey is of other heads or of another text; rebuild it with survey.survey.")
        if self.table is not None and len(self.table) != n_heads:
            other = f"The table of heads belongs to another module than this one with {n_heads} heads"
            raise UserError(f"{other}; make it with `lorsa heads`.")
        for module, kind, what in (
            (self.sae, "sae", "an SAE of the layer's output"),
            (self.transcoder, "transcoder", "a transcoder on the layer's input"),
        ):
            config = module and module.config
            if config and (config.kind != kind or config.d_model != d_model):
                raise UserError(f"This is a {config.kind} of width {config.d_model}; give {what}, of width {d_model}.")

    @torch.no_grad()
    def heads(self, chosen: Sequence[int]) -> Iterator[Head]:
        """Read the text once for all `chosen` heads, yielded in this order.

        Raises:
            UserError: there is no such head.
        """
        LorsaHeads(self.lorsa).check(chosen)
        places = {head: choose_places(self.survey, head, self.sequences, self.seed) for head in chosen}
        contexts = self._contexts(places)
        words, name = Words(self.model), Path(self.model.name)
        for head in chosen:
            shares = None if self.shares is None or self.shares[head].isnan().any() else self.shares[head].tolist()
            explanation, score = self.explanations.get(head, (None, None))
            yield Head(
                model=name.name if name.exists() else self.model.name,
                layer=self.layer,
                head=head,
                n_heads=self.lorsa.n_units,
                group=head // self.lorsa.config.group_size,
                n_tokens=self.survey.n_tokens,
                facts={str(key): float(value) for key, value in self.survey.facts.iloc[head].items()},
                raised=words.extremes(self.lorsa.W_O[head], largest=True),
                lowered=words.extremes(self.lorsa.W_O[head], largest=False),
                contexts=contexts[head],
                siblings=self._siblings(head, words),
                written_features=_nearest(self.lorsa.W_O[head], self.sae, "W_O", words),
                read_features=_nearest(self.lorsa.W_V[head], self.transcoder, "W_E", words),
                shares=shares,
                explanation=explanation,
                score=score,
                **({} if self.table is None else named(self.table.iloc[head])),
            )

    def _contexts(self, places: Mapping[int, list[Place]]) -> dict[int, list[Context]]:
        """In the order of the places; each sequence is read once, no further than it is shown."""
        shown: dict[int, list[tuple[int, int, Place]]] = defaultdict(list)
        for head, of_head in places.items():
            for number, place in enumerate(of_head):
                shown[place.row].append((head, number, place))
        length = self.sequences.tokens.shape[1]
        ends = {row: min(max(at.position for *_, at in of_row) + AFTER + 1, length) for row, of_row in shown.items()}
        rows = sorted(shown, key=lambda row: (ends[row], row))
        contexts: dict[tuple[int, int], Context] = {}
        batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        for batch in tqdm(batches, unit="batch", desc="contexts", disable=not self.progress):
            tokens = self.sequences.tokens[batch].to(self.model.device, torch.long)
            inputs = self.model.capture(tokens, [self.layer])[self.layer][0][:, : ends[batch[-1]]].float()
            for row, x, *kept in zip(batch, inputs, *self.lorsa.encode(inputs), strict=True):
                counted = int(self.sequences.mask[row].nonzero().max()) + 1  # what comes after is padding
                ids = self.sequences.tokens[row, :counted].tolist()
                reading = Reading(ids, token_texts(self.model.tokenizer, ids), x, *kept)
                for head, number, place in shown[row]:
                    contexts[head, number] = read_context(self.lorsa, head, reading, place)
        return {head: [contexts[head, number] for number in range(len(of_head))] for head, of_head in places.items()}

    def _siblings(self, head: int, words: Words) -> pd.DataFrame:
        lorsa, size = self.lorsa, self.lorsa.config.group_size
        heads = [other for other in range(head // size * size, (head // size + 1) * size) if other != head]
        families = [] if self.table is None else [named(self.table.iloc[other])["families"] for other in heads]
        rows = {
            "head": heads,
            "families": [", ".join(names) for names in families] or "",
            "frequency": self.survey.facts["frequency"].iloc[heads].to_numpy(),
            "tokens": words.raised(lorsa.W_O[heads]),
        }
        for name, weights in (("cos_o", lorsa.W_O), ("cos_v", lorsa.W_V)):
            rows[name] = _cosines(weights[heads], weights[head]).cpu().numpy()
        return pd.DataFrame(rows)


class Words:
    """Tokens that write directions raise or lower."""

    def __init__(self, model: LanguageModel) -> None:
        self.unembedding, self.tokenizer = Unembedding(model), model.tokenizer

    def extremes(self, direction: Tensor, largest: bool) -> list[tuple[str, float]]:
        """Tokens that a direction [d_model], scaled to norm 1, raises or lowers most, with their logits."""
        logits = self.unembedding.logits(normalize(direction[None], dim=1))[0]
        values, indices = logits.topk(N_TOKENS, largest=largest)
        return list(zip(texts_alone(self.tokenizer, indices.tolist()), values.tolist(), strict=True))

    def raised(self, directions: Tensor, n: int = 4) -> list[list[str]]:
        """The `n` tokens that each direction [n_directions, d_model] raises most."""
        return [texts_alone(self.tokenizer, row) for row in self.unembedding.top_tokens(directions, n).tolist()]


def named(row: Any) -> dict[str, Any]:
    """What a row of a table of heads says of its names: these fields of `Head`."""
    names = row["families"].split("; ") if row["families"] else []
    scores = {name: {score: float(row.get(f"{name}_{score}", np.nan)) for score in SCORES} for name in names}
    effect = (float(row.get("effect", np.nan)), float(row.get("effect_error", np.nan)))
    return {
        "families": [FAMILIES[name].label for name in names],
        "named": True,
        "scores": {
            FAMILIES[name].label: {score: value for score, value in values.items() if np.isfinite(value)}
            for name, values in scores.items()
        },
        "effect": effect if np.isfinite(effect[0]) else None,
    }


def _cosines(directions: Tensor, direction: Tensor) -> Tensor:
    return normalize(directions, dim=1) @ normalize(direction, dim=0)


def _nearest(direction: Tensor, module: SAE | None, side: str, words: Words) -> list[Feature] | None:
    """Features whose rows of the weights `side` have the largest cosine with `direction`."""
    if module is None:
        return None
    cosines = _cosines(getattr(module, side), direction)
    values, numbers = cosines.topk(min(N_FEATURES, len(cosines)))
    tokens = words.raised(module.W_O[numbers])
    return [Feature(*row) for row in zip(numbers.tolist(), values.tolist(), tokens, strict=True)]
