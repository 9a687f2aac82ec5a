"""Initial weights. Good ones are matched to the data, which takes a few batches of activations.

Lorsa, `mhsa`: QK group g copies the (W_Q, W_K) of MHSA head h = g mod n_heads. Each of its Lorsa heads writes along a
random direction of the output space of h, and its z is the component of h's output along it. With value map
V_h [d_model, d_head], value bias b_h, output map O_h [d_head, d_model] and random r in R^d_head,

    w_o = r O_h / ||r O_h||,   e = O_h w_o,   w_v = V_h e,   b_V = e . (b_h - mean(z_h))

so that z = w_o . (head output - its mean). Attention outputs fill only part of the residual stream; heads outside it
would be dead from the start.

Lorsa, `random`: normal weights of variance 1 / d_model.

SAE and transcoder: write directions are drawn with the covariance of the targets; read directions equal them (SAE) or
are the least-squares map to them (transcoder).

Finally a least-squares scalar on the reads gives the first prediction the right size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa, Scaling, SparseModule
from lorsa_utils.models import AttentionSite

CALIBRATION_SEQUENCES = 32


@torch.no_grad()
def initialize(
    module: Lorsa | SAE, site: AttentionSite, x: Tensor, y: Tensor, mask: Tensor, init: str, seed: int
) -> Scaling:
    """Fill a fresh module and return the space it is trained in.

    `x` and `y` are raw inputs and outputs of the layer, [n, length, d_model], `mask` [n, length] its counted tokens.
    `init` is `mhsa` or `random`; an SAE or transcoder ignores it. UserError if d_qk is not the head width that `mhsa`
    copies.
    """
    generator = torch.Generator().manual_seed(seed)
    reads = module.input_from(x, y)
    input_mean = reads[mask].mean(dim=0)
    scaling = Scaling(input_mean, norm_scale(reads - input_mean, mask), norm_scale(y, mask))
    inputs, targets = scaling.inputs(reads), scaling.targets(y)
    if isinstance(module, SAE):
        _start_dictionary(module, inputs[mask], targets[mask], generator)
    elif init == "mhsa":
        _start_from_mhsa(module, site, x, mask, generator)
        module.unfold(scaling)
    else:  # inputs of norm sqrt(d_model) give queries, keys and values with entries of size 1
        for parameter in (module.W_Q, module.W_K, module.W_V, module.W_O):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * module.config.d_model**-0.5)
    module.fold_norms()
    module.b_O.copy_(targets[mask].mean(dim=0))
    match_scale(module, inputs, targets, mask)
    return scaling


def norm_scale(values: Tensor, mask: Tensor) -> float:
    """sqrt(d_model) / mean token norm of values [n, length, d_model] over counted tokens."""
    return float(values.shape[-1] ** 0.5 / values[mask].norm(dim=-1).mean())


def _start_from_mhsa(module: Lorsa, site: AttentionSite, x: Tensor, mask: Tensor, generator: torch.Generator) -> None:
    """In raw space."""
    config = module.config
    if config.d_qk != site.d_head:
        raise UserError(
            f"The mhsa start copies heads of width {site.d_head}, not {config.d_qk}; "
            f"use d_qk {site.d_head} or --init random."
        )
    heads = torch.arange(config.n_qk_heads) % site.n_heads
    W_K, b_K, W_V, b_V = (site.expand_kv(tensor) for tensor in (site.W_K, site.b_K, site.W_V, site.b_V))
    for target, source in ((module.W_Q, site.W_Q), (module.W_K, W_K), (module.b_Q, site.b_Q), (module.b_K, b_K)):
        target.copy_(source[heads.to(source.device)])
    if site.q_norm_weight is not None and site.k_norm_weight is not None:
        module.q_norm.copy_(site.q_norm_weight.expand_as(module.q_norm))
        module.k_norm.copy_(site.k_norm_weight.expand_as(module.k_norm))
    batches = zip(x.split(8), mask.split(8), strict=True)
    mean_z = torch.cat([site.head_values(rows)[kept] for rows, kept in batches]).mean(dim=0)
    size = config.group_size
    for group, head in enumerate(heads.tolist()):
        block = slice(group * size, (group + 1) * size)
        draw = torch.randn(size, site.d_head, generator=generator).to(x.device)
        write = torch.nn.functional.normalize(draw @ site.W_O[head], dim=1)
        read = write @ site.W_O[head].T
        module.W_O[block] = write
        module.W_V[block] = read @ W_V[head].T
        module.b_V[block] = read @ (b_V[head] - mean_z[head])


def _start_dictionary(module: SAE, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    mean = x.mean(dim=0)
    centred_x, centred_y = x - mean, y - y.mean(dim=0)
    tokens = torch.randn(module.n_units, min(len(y), 4096), generator=generator).to(y.device)
    # A random mixture of tokens is a draw from a normal distribution with the data's covariance.
    write = read = torch.nn.functional.normalize(tokens @ centred_y[: tokens.shape[1]], dim=1)
    if module.config.kind == "transcoder":
        gram = centred_x.T @ centred_x + 1e-3 * len(x) * torch.eye(x.shape[-1], device=x.device)
        read = write @ torch.linalg.solve(gram, centred_x.T @ centred_y).T
    module.W_O.copy_(write)
    module.W_E.copy_(read)
    module.b_E.copy_(-(read @ mean))


@torch.no_grad()
def match_scale(module: SparseModule, x: Tensor, y: Tensor, mask: Tensor, batch_size: int = 8) -> float:
    """Multiply the reads by the least-squares scalar between prediction and target, and return it."""
    dot = norm = 0.0
    for rows, target, kept in zip(x.split(batch_size), y.split(batch_size), mask.split(batch_size), strict=True):
        predicted = (module(rows).y - module.b_O)[kept]
        dot += float((predicted * (target - module.b_O)[kept]).sum())
        norm += float(predicted.square().sum())
    scalar = dot / norm if norm > 0 and dot > 0 else 1.0
    for reader in module.readers[-1]:
        reader.mul_(scalar)
    return scalar
