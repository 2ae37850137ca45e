"""Refinement: what the encoder gives is a guess; gradient steps on the latent values make it fit one network.

An encoder maps all checkpoints alike. The best embedding of one checkpoint under the losses of the representation is
found with the decoder fixed (semi-amortized inference: Kim et al. 2018, arXiv 1802.02550), in two moves. `projected`:
what the decoder misses of each token is moved into directions along which the network's outputs do not change, a linear
problem per token. `descend`: gradient steps on the losses. The same descent lets a drawn embedding learn what its
network should do, with the outputs of teachers as the goal.

With details, the sketch of an embedding stays as it is and its details move.

Legend: n checkpoints, T tokens, D token size, W coordinates of an embedding per token, N queries in all, Q per step, C
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.config import RefineConfig
from weightspace.hyperrep import losses
from weightspace.hyperrep.directions import nearest
from weightspace.hyperrep.representation import Decoding, Embeddings, HyperRepresentation
from weightspace.hyperrep.sensitivity import MATRICES_AT_ONCE, TOO_LARGE, affordable, sensitivities
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.inventing import invented
from weightspace.runs import derive_seed, notice
from weightspace.tasks.images import ImageTask
from weightspace.tasks.queries import Invent, query_set

ROWS_AT_ONCE = 128
"""Checkpoints refined together, so that memory stays bounded."""
FARTHEST = 10.0
"""How many times the step size may be that of the config where the encoder's guess is bad."""
MOST_QUERIES = 20_000
"""Queries on which the outputs of the checkpoints are kept."""
DECAYS = (0.9, 0.99)
"""Of Adam's moments: a hundred steps have to be enough."""
ROUNDING = 1e-6
"""Gradients far below this are rounding, of tokens that fit already: Adam must not scale them up to whole steps."""


def refined(
    representation: HyperRepresentation,
    checkpoints: Checkpoints,
    tasks: Mapping[str, ImageTask],
    config: RefineConfig,
    seed: int = 0,
    training: Checkpoints | None = None,
    advance: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embeddings of checkpoints: the encoder's, projected and descended as far as the config asks for it.

    Args:
        representation: the representation; its losses say what is descended.
        checkpoints: n checkpoints of one base network.
        tasks: {name: task} of the checkpoints; behavior is compared on queries for their own.
        config: how many steps, how large, on which queries.
        seed: seed of the queries.
        training: training checkpoints, for queries that are `invented`.
        advance: told how many checkpoints are done.
    """
    representation = representation.on(checkpoints.architecture)
    embeddings = representation.embed(checkpoints)
    if not config.steps and not config.projection:
        if advance is not None:
            advance(len(checkpoints))
        return embeddings
    z, compares = embeddings.z.clone(), compares_behavior(representation)
    if config.projection and compares and not affordable(representation.tokenizer):
        notice(f"no projection: {TOO_LARGE}")
    for name, rows in checkpoints.frame.reset_index(drop=True).groupby("task"):
        task, index = tasks[str(name)], torch.as_tensor(rows.index.to_numpy(copy=True))
        own = training and training.rows((training.frame["task"] == name).to_numpy())
        inputs = refining_queries(task, config, seed, own)
        for chunk in index.split(ROWS_AT_ONCE):
            some = checkpoints.rows(chunk.numpy()).to(representation.device)
            tokens, start = representation.tokens(some.weights), z[chunk].to(representation.device)
            decoding = representation.decoding(start)
            logits = behavior.outputs(some, inputs).logits if compares else None
            if logits is not None:
                start = projected(representation, decoding, some, start, logits, inputs, config, seed, task.real)
            found = descend(representation, decoding, start, tokens, logits, inputs, config, seed, task.real)
            z[chunk] = found.cpu()
            if advance is not None:
                advance(len(chunk))
    return Embeddings(z, checkpoints.frame, checkpoints.architecture)


def compares_behavior(representation: HyperRepresentation) -> bool:
    """Whether its losses compare behavior at the end of training; if not, refinement runs no network."""
    return losses.scheduled(representation.loss_config.beta, 1.0) < 1


def refining_queries(task: ImageTask, config: RefineConfig, seed: int, training: Checkpoints | None = None) -> Tensor:
    """The queries [N, ...] that a refinement for checkpoints of one task draws from, at most `MOST_QUERIES`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "refine", "queries", task.name))
    invent: Invent | None = partial(invented, training) if training is not None else None
    every = torch.cat(query_set(config.query_set, task, [task], generator, invent).sources)
    if len(every) <= MOST_QUERIES:
        return every
    return every[torch.randperm(len(every), generator=generator)[:MOST_QUERIES].to(every.device)]


@torch.no_grad()
def projected(
    representation: HyperRepresentation,
    decoding: Decoding,
    checkpoints: Checkpoints,
    z: Tensor,
    logits: Tensor,
    inputs: Tensor,
    config: RefineConfig,
    seed: int,
    real: bool = False,
) -> Tensor:
    """Move embeddings [n, T, W] to the least error of each token in the metric of its network's own outputs.

    Of what the decoded token lacks, r, the change of coordinates a that minimizes (r - a B)^T M (r - a B) is added,
    with the directions B along which it is decoded and the token's Gauss-Newton matrix M (`sensitivity`) on
    `config.projection` queries. Nothing is moved where decoding is not linear or M takes too much memory.

    Args:
        representation: the representation of the base network.
        decoding: how embeddings around these are decoded.
        checkpoints: n checkpoints, on its device.
        z: their embeddings.
        logits: what they give on the queries [n, N, C].
        inputs: the queries [N, ...].
        config: how many of the queries are used.
        seed: seed of the choice of queries and of the classes drawn for M.
        real: whether outputs are values, not logits of classes.
    """
    tokenizer, mask = representation.tokenizer, representation.autoencoder.mask
    if not config.projection or not affordable(tokenizer):
        return z
    seed = derive_seed(seed, "refine", "projection")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    order = order[: config.projection].to(inputs.device)
    chosen, wanted = inputs[order], logits[:, order]
    distance = losses.distance_of(representation.loss_config, real)

    def error(tokens: Tensor) -> Tensor:
        """L_B of each network [n], not scaled."""
        decoded = Checkpoints(checkpoints.architecture, representation.weights(tokens), checkpoints.frame)
        return distance(behavior.outputs(decoded, chosen).logits, wanted).mean(1)

    before = decoding(z)
    lacking = (representation.tokens(checkpoints.weights) - before) * mask  # [n, T, D]
    some, changes = max(MATRICES_AT_ONCE // (len(mask) * mask.shape[1] ** 2), 1), []
    for first in range(0, len(z), some):
        rows = slice(first, first + some)
        directions = decoding.directions(rows)  # [n, T, R, D]
        if directions is None:
            return z
        own = checkpoints.rows(np.arange(len(z))[rows])
        matrices = sensitivities(tokenizer, representation.normalizer, own, chosen, real, seed)
        changes.append(nearest(lacking[rows], directions, matrices, mask))
    change = torch.cat(changes)  # [n, T, R]
    found = z + F.pad(change, (z.shape[2] - change.shape[2], 0))
    better = error(decoding(found)) < error(before)  # what is far away is not moved rightly by a linear rule
    return torch.where(better[:, None, None], found, z)


def descend(
    representation: HyperRepresentation,
    decoding: Decoding,
    start: Tensor,
    tokens: Tensor,
    logits: Tensor | None,
    inputs: Tensor,
    config: RefineConfig,
    seed: int = 0,
    real: bool = False,
) -> Tensor:
    """Descend (1 - beta) L_B + beta L_S in the latent values of n networks, each on its own: [n, T, W] -> [n, T, W].

    Distance, beta (at the end of its schedule) and scale are those of the representation. The step size of a network
    grows with the root of its behavioral loss at the start.

    Args:
        representation: the representation of the base network.
        decoding: how embeddings around these are decoded.
        start: embeddings to start from [n, T, W].
        tokens: normalized tokens that the decoded ones should be like [n, T, D].
        logits: what the decoded networks should give on the queries [n, N, C]; without them L_S alone is descended.
        inputs: the queries [N, ...].
        config: steps, step size and queries per step.
        seed: seed of the queries of each step.
        real: whether outputs are values, not logits of classes.
    """
    loss = representation.loss_config
    beta, distance = losses.scheduled(loss.beta, 1.0), losses.distance_of(loss, real)
    mask = representation.autoencoder.mask
    count = min(config.queries, len(inputs))

    def structural(decoded: Tensor, step: int) -> Tensor:
        """L_S of each network [n]."""
        return ((decoded - tokens).square() * mask).sum((1, 2)) / mask.sum()

    if logits is None:
        objective, reach = structural, torch.ones(len(start), 1, 1, device=start.device)
    else:
        network = behavior.runner(representation.architecture, start.device)
        scale = behavioral_scale(representation.info)
        group = behavior.calibrate(representation.architecture, start.device, count, len(start), training=True)

        def behavioral(decoded: Tensor, step: int) -> Tensor:
            """L_B of each network [n] on the queries of a step."""
            generator = torch.Generator().manual_seed(derive_seed(seed, "refine", step))
            chosen = torch.randperm(len(inputs), generator=generator)[:count].to(inputs.device)
            found = behavior.logits(network, representation.weights(decoded), inputs[chosen], group)
            return distance(found, logits[:, chosen]).mean(1) / scale

        def objective(decoded: Tensor, step: int) -> Tensor:
            return (1 - beta) * behavioral(decoded, step) + beta * structural(decoded, step)

        with torch.no_grad():
            error = behavioral(decoding(start), -1)
        reach = error.sqrt().clamp(1, FARTHEST)[:, None, None]
    moved = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([moved], config.learning_rate, DECAYS, ROUNDING)
    for step in range(config.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        with torch.enable_grad():
            each = objective(decoding(start + reach * moved), step)
            (moved.grad,) = torch.autograd.grad(each.sum(), [moved])
        optimizer.step()
    return (start + reach * moved).detach()


def behavioral_scale(info: Mapping[str, Any]) -> float:
    """The value by which a representation's behavioral loss is divided; of several zoos their mean."""
    scales = info["scales"] if isinstance(info["scales"], list) else [info["scales"]]
    return sum(each["behavioral"] for each in scales) / len(scales)
