"""Tiny random language models of every supported architecture, saved to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

KINDS = ("gpt_neox", "gpt_neox_sequential", "llama", "gpt2", "qwen3")
"""Pythia-like (25 % rotary, parallel residual), the same with a sequential residual, Llama 3-like (4 query heads on 2
key heads, llama3 RoPE with an original context of 32), GPT-2-like (learned positions), Qwen3-like (QK norm, d_head not
d_model / n_heads)."""

N_LAYERS = 3
D_MODEL = 64
N_TOKENS = 259
"""256 bytes, then <bos> 256, <eos> 257, <pad> 258."""

_WIDTHS = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
_COMMON = {"vocab_size": N_TOKENS, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def rope(theta: float = 10000.0, **others: Any) -> dict[str, Any]:
    """`rope_parameters` of a config."""
    return {"rope_type": "default", "rope_theta": theta} | others


def settings(kind: str) -> tuple[str, dict[str, Any]]:
    """Model type and config arguments of one kind."""
    if kind == "gpt2":
        return "gpt2", _COMMON | {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
    neox = {"rope_parameters": rope(partial_rotary_factor=0.25), "use_parallel_residual": kind == "gpt_neox"}
    llama3 = rope(rope_type="llama3", **LLAMA3)
    own: dict[str, dict[str, Any]] = {
        "gpt_neox": neox,
        "gpt_neox_sequential": neox,
        "llama": {"num_key_value_heads": 2, "rope_parameters": llama3, "attention_bias": True},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 24, "rope_parameters": rope(1000000.0)},
    }
    return kind.removesuffix("_sequential"), _COMMON | _WIDTHS | {"max_position_embeddings": 128} | own[kind]


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
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.15 * noise)
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


def save_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Write a tiny Llama and the byte tokenizer as one fp32 GGUF file, and beside it the folder it was made from.

    Readers want at least two merges, so "th" is token 259 and "in" 260.
    """
    from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map

    plain = {"attention_bias": False, "rope_parameters": rope(), "tie_word_embeddings": True}
    folder = save_tiny_model(path.with_suffix(".folder"), "llama", seed, vocab_size=N_TOKENS + 2, **plain)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, byte_tokenizer()
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": [*tokenizer.convert_ids_to_tokens(range(N_TOKENS)), "th", "in"],
        "token_types": [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 2,
        "token_merges": ["t h", "i n"],
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "unk_token_id": 258,
    }
    writer = GGUFWriter(path, "llama")
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), _gguf_order(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_order(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """GGUF keeps a Llama's queries and keys with adjacent pairs, the folder with halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
