"""What an error in a token does to a network's outputs: the Gauss-Newton matrix of the behavioral loss, token by token.

Legend: n checkpoints, T tokens, D token size, Q queries, P weights of one network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.tokens.normalize import Normalizer
from weightspace.tokens.tokenizer import Tokenizer

GRADIENTS_AT_ONCE = 2**25
"""Numbers in the gradients of one vectorized call, so that memory stays bounded."""
MATRICES_AT_ONCE = 2**25
"""Numbers in the matrices of all tokens of the checkpoints that are worked on together."""
RIDGE = 0.1
"""Share of the mean diagonal that is added to every diagonal: weights that no query uses count a little."""


def affordable(tokenizer: Tokenizer) -> bool:
    """Whether the matrices of one checkpoint fit into bounded memory and its network can be vectorized over queries."""
    tokens, size = tokenizer.mask.shape
    fits = tokens * size**2 <= MATRICES_AT_ONCE and tokenizer.architecture.parameter_count <= GRADIENTS_AT_ONCE
    return fits and behavior.vectorized(tokenizer.architecture)


def sensitivities(
    tokenizer: Tokenizer, normalizer: Normalizer, checkpoints: Checkpoints, inputs: Tensor, real: bool, seed: int
) -> Tensor:
    """The Gauss-Newton matrix of each token of n checkpoints on queries [Q, ...], in normalized units: [n, T, D, D].

    The ridge is added. Every checkpoint sees the same randomness, so that its matrices do not depend on the others.
    Checkpoints go one after another: each call is vectorized over its queries, and fills the memory that it may take.
    """
    network = behavior.runner(checkpoints.architecture, inputs.device)
    each = [
        _summed(tokenizer, normalizer, network, checkpoints, row, inputs, real, torch.Generator().manual_seed(seed))
        for row in range(len(checkpoints))
    ]
    return with_ridge(torch.stack(each) / len(inputs), tokenizer.mask)


def mean_sensitivity(
    tokenizer: Tokenizer,
    normalizer: Normalizer,
    checkpoints: Checkpoints,
    inputs: Tensor,
    real: bool,
    generator: torch.Generator,
) -> Tensor:
    """The mean over n checkpoints, each on an equal share of the queries, and over the tokens of a layer: [T, D, D].

    The ridge is added.
    """
    network, mask = behavior.runner(checkpoints.architecture, inputs.device), tokenizer.mask
    total = torch.zeros(*mask.shape, mask.shape[1])
    for row, share in enumerate(inputs.tensor_split(len(checkpoints))):
        total += _summed(tokenizer, normalizer, network, checkpoints, row, share, real, generator).cpu() / len(inputs)
    layers = tokenizer.positions[:, 1]
    for layer in layers.unique():
        total[layers == layer] = total[layers == layer].mean(0)
    return with_ridge(total, mask)


def with_ridge(matrices: Tensor, mask: Tensor) -> Tensor:
    """Matrices [..., T, D, D] of tokens with a mask [T, D], `RIDGE` times the mean diagonal added on it."""
    mask = mask.to(matrices)
    size = mask.sum(1).clamp(min=1)
    level = matrices.diagonal(dim1=-2, dim2=-1).sum(-1) / size  # [..., T]
    tiny = torch.finfo(matrices.dtype).tiny  # of a token that moves nothing
    return matrices + torch.diag_embed((RIDGE * level).clamp(min=tiny)[..., None] * mask)


def _summed(
    tokenizer: Tokenizer,
    normalizer: Normalizer,
    network: torch.nn.Module,
    checkpoints: Checkpoints,
    row: int,
    inputs: Tensor,
    real: bool,
    generator: torch.Generator,
) -> Tensor:
    """The sum over queries of the outer products of each token's gradient, of one checkpoint: [T, D, D]."""
    weights = {name: weight[row].to(inputs.device) for name, weight in checkpoints.weights.items()}
    mask = tokenizer.mask
    total = torch.zeros(*mask.shape, mask.shape[1], device=inputs.device)
    some = max(GRADIENTS_AT_ONCE // mask.numel(), 1)
    scale = normalizer.std.to(inputs.device)  # d(weight) / d(normalized token)
    for batch in inputs.split(some):
        found = behavior.gradients(network, weights, batch, real, generator)
        tokens = tokenizer.tokenize(found).x * scale  # [Q, T, D]
        columns = tokens.transpose(0, 1)  # [T, Q, D]
        total += columns.transpose(1, 2) @ columns
    return total
