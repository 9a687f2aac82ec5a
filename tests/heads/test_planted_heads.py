"""Real Lorsa heads built by hand, from activations to explanations: digits, a comma as source, a word seen before."""

from typing import Any

import torch
from hand_model import BEFORE, CODE, D_MODEL, DAY, FIRST, PLACE, PLACE_BEFORE, SHARP, TOKEN, HandModel
from judged_text import SAID, make_tokens
from toys import sequences_of

from lorsa_utils.activations import ActivationStream
from lorsa_utils.autointerp import examples, study
from lorsa_utils.autointerp.examples import Budget, Dictionary
from lorsa_utils.autointerp.judges import RulesJudge
from lorsa_utils.config import LorsaConfig
from lorsa_utils.heads.prompts import Vocabulary
from lorsa_utils.lorsa import Lorsa


def planted(model: HandModel, comma: int) -> Lorsa:
    """Head 0 reads a digit on its token, head 1 a comma before, head 2 rests on the first token until one returns."""
    lorsa = Lorsa(LorsaConfig(d_model=D_MODEL, n_ov_heads=3, n_qk_heads=3, d_qk=CODE + 1, k=3, attn_scale=1.0))
    circuits = ((PLACE, PLACE), (PLACE_BEFORE, PLACE), (TOKEN, BEFORE))
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.zero_()
        for head, (query, key) in enumerate(circuits):
            lorsa.W_Q[head, query, :CODE], lorsa.W_K[head, key, :CODE] = SHARP * torch.eye(CODE), torch.eye(CODE)
            lorsa.W_K[head, FIRST, CODE] = 1
            lorsa.b_Q[head, CODE] = 0.7 * SHARP
        lorsa.W_V[0, DAY], lorsa.b_V[0] = 1.0, -0.5
        lorsa.W_V[1, TOKEN], lorsa.b_V[1] = model.codes[comma], -0.6
        lorsa.W_V[2, FIRST], lorsa.b_V[2] = -2.0, 1.0
        lorsa.W_O.copy_(torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0)))
    return lorsa.requires_grad_(False)


def test_planted_heads_are_explained_and_score_above_nine_tenths(words: Vocabulary) -> None:
    model: Any = HandModel(words)
    digits, (comma,) = [words.encode(str(digit))[0] for digit in range(10)], words.encode(",")
    model.days = torch.tensor(digits)  # what the stream marks
    budget = Budget(units=3, shown=40, contrast=40, scored=20, oversampling=1)
    tokens = torch.from_numpy(make_tokens(260, words.words, digits, comma, model.vocabulary.bos_id))
    source = ActivationStream(model, sequences_of(tokens, tokens != model.vocabulary.bos_id), [0])
    dictionary, sites = Dictionary("Lorsa", 0, planted(model, comma)), {0: model.site(0)}
    firings = examples.record_firings(source, [dictionary], sites, words.tokenizer, budget, 64, progress=False)
    sets = [examples.examples(one, budget) for one in firings]
    scores = study.study(sets, RulesJudge(), progress=False).set_index("unit")
    assert scores["explanation"].to_dict() == dict(enumerate(SAID))
    assert (scores[["detection", "fuzzing", "simulation"]] > 0.9).all(axis=None)
    assert (scores["shuffled"] < 0.7).all()
