"""Planted rules are read back exactly, from arrays and a layer built by hand; gradual and random units get no name."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import word_tokenizer
from torch import Tensor

from lorsa_utils.config import LorsaConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import arithmetic, prompts
from lorsa_utils.heads.arithmetic import Activations, Rule
from lorsa_utils.lorsa import Lorsa

OP1, OP2 = np.indices((100, 100))


def planted(rule: Rule, operator: str = "+", noise: float = 0.0, seed: int = 0) -> np.ndarray:
    z = 0.1 + 2.0 * rule.holds(OP1, OP2, operator)
    return np.asarray(z + noise * np.random.default_rng(seed).normal(size=z.shape))


RULES = [
    Rule("op1", 0, tuple(range(27, 44))),
    Rule("op2", 0, tuple(range(50, 100))),
    Rule("op1", 10, (4, 5, 6)),
    Rule("op1", 10, (6, 7, 8)),
    Rule("op2", 10, (0, 9)),
    Rule("op1", 2, (1,)),  # simpler than five residues modulo 10
    Rule("op2", 3, (0, 2)),
    Rule("result", 0, tuple(range(90, 111))),
    Rule("result", 10, (8,)),
    Rule("carry", 0, (1,)),
]
OTHERS = [(Rule("result", 7, (3,)), "*"), (Rule("carry", 0, (1,)), "-"), (Rule("op1", 4, (2,)), "*")]


@pytest.mark.parametrize(("rule", "operator"), [*((rule, "+") for rule in RULES), *OTHERS], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_planted_rules_are_read_back_exactly(rule: Rule, operator: str, noise: float) -> None:
    z = planted(rule, operator, noise)
    best = arithmetic.best_rule(z, operator)
    assert best is not None
    assert best.rule == rule
    assert best.base == pytest.approx(0.1, abs=0.05)
    assert best.height == pytest.approx(2, abs=0.05)
    ceiling = 1 - noise**2 / z.var()
    assert best.explained == pytest.approx(ceiling, abs=0.03)
    assert best.explained > best.smooth


def test_gradual_and_random_units_get_no_name() -> None:
    gradual = (OP1 + 0.5 * OP2) / 100
    noise = np.random.default_rng(0).normal(size=(100, 100))
    wave = 1 - ((OP1 - 50) / 50) ** 2
    z = torch.tensor(np.stack([gradual, noise, wave, planted(RULES[0]), np.zeros((100, 100)), np.ones((100, 100))]))
    table = arithmetic.rule_table(Activations(z)).set_index("unit")
    assert table["named"].to_dict() == {0: False, 1: False, 2: False, 3: True}, "a constant unit has no rule"
    assert table.loc[0, "smooth"] == pytest.approx(1)
    assert abs(table.loc[1, "explained"]) < 0.02
    assert arithmetic.rule_table(Activations(torch.zeros(3, 10, 10))).empty


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-9, 9)), min_size=2, max_size=7))
def test_best_sets_beat_every_other(cells: list[tuple[int, int]]) -> None:
    counts, sums = np.array([c for c, _ in cells], dtype=float), np.array([c * m for c, m in cells], dtype=float)

    def gain(chosen: Sequence[bool]) -> float:
        mask = np.array(chosen)
        return float(arithmetic._between(counts, sums, counts[mask].sum(), sums[mask].sum()))

    n = len(cells)
    subsets = [[bool(number >> i & 1) for i in range(n)] for number in range(1, 2**n - 1)]
    ranges = [chosen for chosen in subsets if "01" not in "".join(str(int(one)) for one in chosen).lstrip("0")]
    for best, sets in ((arithmetic._best_residues, subsets), (arithmetic._best_range, ranges)):
        if max(map(gain, sets)) > 0:
            assert gain(list(best(counts, sums))) == pytest.approx(max(map(gain, sets)))


# ---- prompts


@pytest.mark.parametrize("operator", ["+", "-", "*"])
@pytest.mark.parametrize("which", ["words", "numbers"])
def test_arithmetic_grid(which: str, operator: str) -> None:
    vocabulary = prompts.Vocabulary(word_tokenizer(numbers=which == "numbers"), None)
    grid = arithmetic.arithmetic_grid(vocabulary, operator, 8, 12)
    assert len(grid.tokens) == 25
    width = 2 if which == "words" else 1
    assert int(grid.equals.max()) == 2 * width + 1 + len(vocabulary.start)
    for number in range(25):
        a, b, end = 8 + number // 5, 8 + number % 5, int(grid.equals[number])
        assert vocabulary.tokenizer.decode(grid.tokens[number, len(vocabulary.start) : end + 1]) == f"{a}{operator}{b}="
        answer = str(prompts.OPERATORS[operator](a, b))
        assert answer.startswith(vocabulary.texts[int(grid.answer[number])])


def test_arithmetic_grid_refuses() -> None:
    words = prompts.Vocabulary(word_tokenizer(), None)
    for arguments, told in ((("/",), "is not one of"), (("+", 5, 5), "must run from"), (("+", -1, 5), "must run from")):
        with pytest.raises(UserError, match=told):
            arithmetic.arithmetic_grid(words, *arguments)  # type: ignore[arg-type]


# ---- a layer built by hand


class NumberModel:
    """Its one layer reads a one-hot code of the token and two marks: the first and the third token (the operands)."""

    device = torch.device("cpu")

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        x = torch.nn.functional.one_hot(tokens, self.n_tokens + 2).float()
        x[:, 0, -2] = x[:, 2, -1] = 1
        return {layer: (x, torch.zeros_like(x)) for layer in layers}

    def logits(self, tokens: Tensor, positions: Any = None) -> Tensor:
        """Says the token of the first operand, whatever the sum."""
        return torch.nn.functional.one_hot(tokens[:, :1].expand_as(tokens), self.n_tokens).float()


def layer_of_rules(rules: Sequence[Rule], numbers: dict[int, int], n_tokens: int) -> Lorsa:
    """One head a rule, on op1 or op2: it looks at its operand, and reads there whether the rule holds."""
    n = len(rules)
    lorsa = Lorsa(LorsaConfig(d_model=n_tokens + 2, n_ov_heads=n, n_qk_heads=n, d_qk=1, k=n, attn_scale=1.0))
    with torch.no_grad():
        lorsa.b_Q.fill_(50.0)
        for head, rule in enumerate(rules):
            lorsa.W_K[head, -2 if rule.variable == "op1" else -1, 0] = 1
            for number, token in numbers.items():
                lorsa.W_V[head, token] = float(rule.holds(np.array(number), np.array(number), "+"))
            lorsa.W_O[head, head] = 1
    return lorsa


def test_the_rules_of_a_layer_built_by_hand_are_read_back() -> None:
    vocabulary = prompts.Vocabulary(word_tokenizer(numbers=True), None)
    grid = arithmetic.arithmetic_grid(vocabulary, "+", 10, 99)
    numbers = {number: vocabulary.encode(str(number))[0] for number in range(10, 100)}
    n_tokens = max(vocabulary.tokenizer.get_vocab().values()) + 1
    known = [RULES[0], RULES[2], RULES[3], RULES[4], Rule("op2", 0, tuple(range(60, 70)))]
    model: Any = NumberModel(n_tokens)
    lorsa = layer_of_rules(known, numbers, n_tokens)
    found = arithmetic.grid_activations(model, 0, lorsa, grid, answers=True, batch_size=1000, progress=False)
    assert found.z.shape == (5, 90, 90)
    assert found.correct.shape == (90, 90)
    assert not found.correct[:40, :40].any(), "op1 is never the sum"
    assert found.correct[0, 90 - 10], "10 begins 100"
    rules = arithmetic.rule_table(found).set_index("unit").sort_index()
    assert rules["rule"].tolist() == [str(rule) for rule in known]
    assert np.allclose(rules["explained"], 1)
    assert rules["named"].all()
