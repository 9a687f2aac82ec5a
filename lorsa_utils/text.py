"""Documents to token sequences, each of one document."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lorsa_utils.corpus import Corpus, Document, TextName, embedded_corpus, load_corpus
from lorsa_utils.exceptions import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorsa_utils.models import LanguageModel

__all__ = ["Corpus", "Document", "TextName", "embedded_corpus", "load_corpus"]  # beside what stands here

MIN_LAST_PIECE = 32
BLOCK_CHARACTERS = 1_000_000
WIKIPEDIA_SHARE = 0.7


@dataclass(frozen=True)
class Sequences:
    """Token sequences of equal length, each from one document."""

    tokens: torch.Tensor
    """Ids, int32 [n, context]."""
    mask: torch.Tensor
    """True where a token counts in the loss: real text, not BOS or padding. Bool [n, context]."""
    source: list[str]
    bos_policy: str
    """`prepend`: BOS at position 0 of every sequence and nowhere else. `none`: no BOS anywhere."""
    sha256: str
    """Of tokens, mask and policy."""
    asked: int | None = None
    """The budget, in tokens that count."""
    documents: Sequence[Document] = field(default=(), repr=False)
    """All documents given, even those that the budget did not reach."""
    origin: TextName | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.mask.sum())

    @property
    def shortfall(self) -> str | None:
        """A sentence if the text gave fewer tokens than asked for."""
        if self.asked is None or self.n_tokens >= self.asked:
            return None
        return (
            f"The text holds {self.n_tokens:,} tokens, fewer than the {self.asked:,} asked for; "
            "all of it is used once, nothing twice."
        )

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens (int64) and mask, each [batch, context]; the last batch may be smaller."""
        for first in range(0, len(self.tokens), batch_size):
            rows = slice(first, first + batch_size)
            yield self.tokens[rows].to(device, torch.long), self.mask[rows].to(device)


class Text(NamedTuple):
    """Sequences to train on and to measure on; no document is in both."""

    train: Sequences
    held_out: Sequences | None
    """None if the text is too short to hold any of it out."""

    def splits(self) -> dict[str, Sequences]:
        """By name: `train` and, where there is any, `held_out`."""
        return {"train": self.train} | ({} if self.held_out is None else {"held_out": self.held_out})


def load_text(
    model: LanguageModel,
    n_tokens: int,
    files: Sequence[str | Path] | None = None,
    dataset: str | None = None,
    *,
    held_out_tokens: int = 100_000,
    context: int = 256,
    bos_policy: str = "auto",
    seed: int = 0,
) -> Text:
    """Text for a model: files or folders (`text_documents`), a dataset (`hub_corpus`) or the embedded text.

    `n_tokens` and `held_out_tokens` are upper limits on tokens that count. For the other arguments see `tokenize`.

    Raises:
        UserError: both files and a dataset are given, they cannot be read, or there is no text.
    """
    corpus = load_corpus(files, dataset, max_tokens=n_tokens + held_out_tokens)
    cut = partial(tokenize, tokenizer=model.tokenizer, context=context, bos_policy=bos_policy, seed=seed)
    train = replace(cut(corpus.train, n_tokens=n_tokens), origin=corpus.origin)
    if not corpus.held_out:
        return Text(train, None)
    return Text(train, replace(cut(corpus.held_out, n_tokens=held_out_tokens), origin=corpus.origin))


def tokenize(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    n_tokens: int | None = None,
    bos_policy: str = "auto",
    seed: int = 0,
) -> Sequences:
    """Cut documents into shuffled sequences of `context` tokens, BOS included.

    A sequence is a piece of one document; a last piece of fewer than 32 tokens is left out, unless there is nothing
    else. Pieces come in a seeded order, none twice, 70 % of the tokens from Wikipedia until one side is used up. The
    first sequences are the same for any budget. Special tokens written out in the text are removed.

    The budget `n_tokens`, in tokens that count, is met exactly by masking the end of the last sequence; None takes
    everything. `bos_policy` is `prepend`, `none`, or `auto`: prepend BOS, or EOS in its place, if there is one.

    Raises:
        UserError: there is no text, or a setting is impossible.
    """
    first = bos_id(tokenizer, bos_policy)
    width = context - (first is not None)
    if width < 1 or context < 2:
        raise UserError(f"context must be at least 2, not {context}.")
    if n_tokens is not None and n_tokens < 1:
        raise UserError(f"The number of tokens must be at least 1, not {n_tokens}.")
    for minimum in (MIN_LAST_PIECE, 2):
        pieces, left = [], sys.maxsize if n_tokens is None else n_tokens
        for source, ids in _mix(documents, tokenizer, width, min(minimum, width), seed):
            pieces.append((source, ids[:left]))
            left -= len(ids)
            if left <= 0:
                break
        if pieces:
            return replace(_assemble(pieces, tokenizer, context, first, n_tokens), documents=documents)
    raise UserError("The text is empty (fewer than two tokens); give a text with at least a few words.")


def bos_id(tokenizer: PreTrainedTokenizerBase, bos_policy: str = "auto") -> int | None:
    """Id at position 0 (BOS, else EOS), or None. 0 is a valid id.

    Raises:
        UserError: the policy is unknown, or is `prepend` and the tokenizer has neither token.
    """
    if bos_policy not in ("auto", "prepend", "none"):
        raise UserError(f"bos_policy must be auto, prepend or none, not {bos_policy!r}.")
    if bos_policy == "none":
        return None
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if bos_policy == "prepend" and not ids:
        raise UserError("This tokenizer has neither a BOS nor an EOS token; use bos_policy 'none'.")
    return ids[0] if ids else None


Piece = tuple[str, np.ndarray]
"""Source and ids."""


def _mix(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, width: int, minimum: int, seed: int
) -> Iterator[Piece]:
    """Alternate, so that Wikipedia has its share at every point until one group is used up."""
    streams = []
    for i, is_wikipedia in enumerate((True, False)):
        group = [document for document in documents if (document.source == "wikipedia") == is_wikipedia]
        streams.append(_pieces(group, tokenizer, width, minimum, np.random.default_rng([seed, i])))
    counts = [0, 0]
    open_groups = {0, 1}
    while open_groups:
        ahead = counts[0] >= WIKIPEDIA_SHARE * (sum(counts) + 1)
        number = min(open_groups, key=lambda i: (i == 0) == ahead)
        piece = next(streams[number], None)
        if piece is None:
            open_groups.remove(number)
        else:
            counts[number] += len(piece[1])
            yield piece


def _pieces(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    width: int,
    minimum: int,
    rng: np.random.Generator,
) -> Iterator[Piece]:
    """Pieces in random order, tokenized on demand, a million characters at a time."""
    order = [documents[i] for i in rng.permutation(len(documents))]
    specials = np.array(sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), dtype=np.int64)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    block: list[Document] = []
    for number, document in enumerate(order):
        block.append(document)
        if number + 1 < len(order) and sum(len(member.text) for member in block) < BLOCK_CHARACTERS:
            continue
        pieces = []
        encoded = tokenizer([member.text for member in block], **options)["input_ids"]
        for member, ids in zip(block, encoded, strict=True):
            row = np.asarray(ids, dtype=np.int64)
            row = row[~np.isin(row, specials)]
            pieces += [(member.source, row[i : i + width]) for i in range(0, len(row), width)]
        pieces = [piece for piece in pieces if len(piece[1]) >= minimum]
        yield from (pieces[i] for i in rng.permutation(len(pieces)))
        block = []


def _assemble(
    pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, context: int, first: int | None, asked: int | None
) -> Sequences:
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    start, policy = (0, "none") if first is None else (1, "prepend")
    tokens = np.full((len(pieces), context), pad_id, dtype=np.int32)
    mask = np.zeros((len(pieces), context), dtype=bool)
    if first is not None:
        tokens[:, 0] = first
    for row, (_, ids) in enumerate(pieces):
        tokens[row, start : start + len(ids)] = ids
        mask[row, start : start + len(ids)] = True
    digest = hashlib.sha256(
        f"{policy} {context}".encode() + tokens.astype("<i4").tobytes() + mask.tobytes()
    ).hexdigest()
    sources = [source for source, _ in pieces]
    return Sequences(torch.from_numpy(tokens), torch.from_numpy(mask), sources, policy, digest, asked)
