"""What an error in a token does to a network's outputs: the Gauss-Newton matrix of the behavioral loss, token by token.

Legend: n checkpoints, T tokens, D token size, Q queries, P weights of one network.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from weightspace.hyperrep.directions import by_size
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.tokens.normalize import Normalizer
from weightspace.tokens.tokenizer import Tokenizer

Result = TypeVar("Result")

GRADIENTS_AT_ONCE = 2**25
"""Numbers in the gradients of one vectorized call, so that memory stays bounded."""
MATRICES_AT_ONCE = 2**25
"""Numbers in the matrices of all tokens of the checkpoints that are worked on together."""
RIDGE = 0.1
"""Share of the mean diagonal that is added to every diagonal: weights that no query uses count a little."""
TOO_LARGE = (
    "the network cannot be vectorized over queries, or the matrices of its tokens (number of tokens x token size^2) "
    "are too large; set a smaller autoencoder.token_size"
)
"""Why what needs the matrices is left out."""


def affordable(tokenizer: Tokenizer) -> bool:
    """Whether the matrices of one checkpoint fit into bounded memory and its network can be vectorized over queries."""
    tokens, size = tokenizer.mask.shape
    fits = tokens * size**2 <= MATRICES_AT_ONCE and tokenizer.architecture.parameter_count <= GRADIENTS_AT_ONCE
    return fits and behavior.vectorized(tokenizer.architecture)


def on_every_core(work: Callable[[slice], Result], count: int, at_once: int, device: torch.device) -> list[Result]:
    """The results of some work on consecutive parts of `count` checkpoints.

    On a CPU every thread that torch may use works on a part of its own: the products of small tokens are not worth to
    be divided, and the decomposition of a matrix is not at all.

    Args:
        work: what to do with a part.
        count: how many checkpoints.
        at_once: the most that are worked on at any time.
        device: where the work is done.
    """
    before = torch.get_num_threads()
    threads = max(min(before, at_once), 1) if device.type == "cpu" else 1
    size = max(min(at_once // threads, -(-count // threads)), 1)
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    torch.set_num_threads(1)  # of every new thread
    try:
        with behavior.plain_attention(), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(before)


def sensitivities(
    tokenizer: Tokenizer, normalizer: Normalizer, checkpoints: Checkpoints, inputs: Tensor, real: bool, seed: int
) -> Tensor:
    """The Gauss-Newton matrix of each token of n checkpoints on queries [Q, ...], in normalized units: [n, T, D, D].

    The ridge is added. Every checkpoint sees the same randomness, so that its matrices do not depend on the others.
    Checkpoints go one after another: each call is vectorized over its queries, and fills the memory that it may take.
    """
    network, mask = behavior.runner(checkpoints.architecture, inputs.device), tokenizer.mask
    found = torch.zeros(len(checkpoints), *mask.shape, mask.shape[1], device=inputs.device)
    for row, matrices in enumerate(found):
        generator = torch.Generator().manual_seed(seed)
        _add(matrices, tokenizer, normalizer, network, checkpoints, row, inputs, real, generator)
    found /= len(inputs)
    _add_ridge(found, mask)
    return found


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
    total = torch.zeros(*mask.shape, mask.shape[1], device=inputs.device)
    for row, share in enumerate(inputs.tensor_split(len(checkpoints))):
        _add(total, tokenizer, normalizer, network, checkpoints, row, share, real, generator)
    total = total.cpu() / len(inputs)
    layers = tokenizer.positions[:, 1]
    for layer in layers.unique():
        total[layers == layer] = total[layers == layer].mean(0)
    _add_ridge(total, mask)
    return total


def _add_ridge(matrices: Tensor, mask: Tensor) -> None:
    """Add `RIDGE` times the mean diagonal to the diagonals of matrices [..., T, D, D] of tokens with a mask [T, D]."""
    mask = mask.to(matrices)
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)  # a view [..., T, D]
    level = diagonal.sum(-1) / mask.sum(1).clamp(min=1)  # [..., T]
    tiny = torch.finfo(matrices.dtype).tiny  # of a token that moves nothing
    diagonal += (RIDGE * level).clamp(min=tiny)[..., None] * mask


def _add(
    total: Tensor,
    tokenizer: Tokenizer,
    normalizer: Normalizer,
    network: torch.nn.Module,
    checkpoints: Checkpoints,
    row: int,
    inputs: Tensor,
    real: bool,
    generator: torch.Generator,
) -> None:
    """Add the outer products of each token's gradient on all queries, of one checkpoint, to a total [T, D, D]."""
    weights = {name: weight[row].to(inputs.device) for name, weight in checkpoints.weights.items()}
    mask = tokenizer.mask
    groups, at_once = by_size(mask.to(inputs.device)), max(GRADIENTS_AT_ONCE // mask.numel(), 1)
    scale = normalizer.std.to(inputs.device)  # d(weight) / d(normalized token)
    for batch in inputs.split(at_once):
        found = behavior.gradients(network, weights, batch, real, generator)
        tokens = tokenizer.tokenize(found).x * scale  # [Q, T, D]
        for some, size in groups:
            rows = tokens[:, some, :size].transpose(0, 1)  # [t, Q, d]
            total[some, :size, :size] += rows.mT @ rows
