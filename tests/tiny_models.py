"""Tiny random language models of every supported architecture, saved to disk, for tests that need one in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

KINDS = ("gpt_neox", "gpt_neox_sequential", "llama", "gpt2", "qwen3")
"""Pythia-like (25 % rotary, parallel residual), the same with a sequential residual, Llama 3-like (4 query heads on 2 key heads,
llama3 RoPE with an original context of 32), GPT-2-like (learned positions), Qwen3-like (QK norm, d_head not d_model / n_heads)."""

N_LAYERS = 3
D_MODEL = 64
N_TOKENS = 259
"""256 bytes, then <bos> 256, <eos> 257, <pad> 258."""

_WIDTHS = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "max_position_embeddings": 128}
_COMMON = {"vocab_size": N_TOKENS, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def settings(kind: str) -> tuple[str, dict[str, Any]]:
    """Model type and config arguments of one kind, in the spelling of transformers 4, which 5 reads as well."""
    if kind in ("gpt_neox", "gpt_neox_sequential"):
        parallel = kind == "gpt_neox"
        return "gpt_neox", _COMMON | _WIDTHS | {"intermediate_size": 64, "rotary_pct": 0.25, "use_parallel_residual": parallel}
    if kind == "llama":
        scaling = {"rope_type": "llama3", **_LLAMA3}
        heads = {"num_key_value_heads": 2, "rope_theta": 10000.0, "rope_scaling": scaling, "attention_bias": True}
        return "llama", _COMMON | _WIDTHS | heads | {"intermediate_size": 64}
    if kind == "gpt2":
        return "gpt2", _COMMON | {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
    if kind == "qwen3":
        heads = {"num_key_value_heads": 2, "head_dim": 24, "rope_theta": 1000000.0}
        return "qwen3", _COMMON | _WIDTHS | heads | {"intermediate_size": 64}
    raise ValueError(kind)


def save_tiny_model(folder: Path, kind: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random model with a byte tokenizer; every parameter is random, biases and norm gains included."""
    model_type, arguments = settings(kind)
    config = AutoConfig.for_model(model_type, **(arguments | overrides))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.25 * noise)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and no merges, so that any text is covered without training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] byte tokens."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
