"""Refinement: what the encoder gives is a guess; gradient steps on the latent values make it fit one network.

An encoder maps all checkpoints alike. The best embedding of one checkpoint under the losses of the representation is
found by gradient steps with the decoder fixed (semi-amortized inference: Kim et al. 2018, arXiv 1802.02550). The same
descent lets a drawn embedding learn what its network should do, with the outputs of teachers as the goal.

With details, the sketch of an embedding stays as it is and its details move, in as many rounds as there are lots: when
the first lot has moved it says anew where the others lie.

Legend: n checkpoints, T tokens, D token size, W coordinates of an embedding per token, N queries in all, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightspace.config import RefineConfig
from weightspace.hyperrep import losses
from weightspace.hyperrep.representation import Decoding, Embeddings, HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.inventing import invented
from weightspace.runs import derive_seed
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
    """Embeddings of checkpoints: the encoder's, descended as far as the config asks for it.

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
    if not config.steps:
        if advance is not None:
            advance(len(checkpoints))
        return representation.embed(checkpoints)
    compares, found = compares_behavior(representation), dict[int, Tensor]()
    for name, rows in checkpoints.frame.reset_index(drop=True).groupby("task"):
        task, index = tasks[str(name)], torch.as_tensor(rows.index.to_numpy(copy=True))
        own = training and training.rows((training.frame["task"] == name).to_numpy())
        inputs = refining_queries(task, config, seed, own)
        for chunk in index.split(rows_at_once(representation)):
            some = checkpoints.rows(chunk.numpy()).to(representation.device)
            tokens = representation.tokens(some.weights)
            goal = behavior.outputs(some, inputs).logits if compares else None
            start = representation.encode(tokens)
            z = descend(representation, start, tokens, goal, inputs, config, seed, task.real).cpu()
            found |= dict(zip(chunk.tolist(), z, strict=True))
            if advance is not None:
                advance(len(chunk))
    z = torch.stack([found[row] for row in range(len(checkpoints))])
    return Embeddings(z, checkpoints.frame, checkpoints.architecture)


def rows_at_once(representation: HyperRepresentation) -> int:
    """How many checkpoints are refined together."""
    return min(ROWS_AT_ONCE, representation.at_once)


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


def descend(
    representation: HyperRepresentation,
    start: Decoding,
    tokens: Tensor,
    goal: Tensor | None,
    inputs: Tensor,
    config: RefineConfig,
    seed: int = 0,
    real: bool = False,
) -> Tensor:
    """Descend (1 - beta) L_B + beta L_S from the embeddings of n networks, each on its own: [n, T, W].

    Distance, beta (at the end of its schedule) and scale are those of the representation. The step size of a network
    grows with the root of its behavioral loss at the start of a round, and falls along a cosine in every round.

    Args:
        representation: the representation of the base network.
        start: the embeddings, and how they are decoded.
        tokens: normalized tokens that the decoded ones should be like [n, T, D].
        goal: what the decoded networks should give on the queries [n, N, C]; without them L_S alone is descended.
        inputs: the queries [N, ...].
        config: steps, step size and queries per step.
        seed: seed of the queries of each step.
        real: whether outputs are values, not logits of classes.
    """
    loss = representation.loss_config
    beta, distance = losses.scheduled(loss.beta, 1.0), losses.distance_of(loss, real)
    mask, count = representation.autoencoder.mask, min(config.queries, len(inputs))
    if goal is not None:
        network = behavior.runner(representation.architecture, tokens.device)
        group = behavior.calibrate(representation.architecture, tokens.device, count, len(tokens), training=True)
        scale = behavioral_scale(representation.info)

    def structural(decoded: Tensor) -> Tensor:
        """L_S of each network [n]."""
        return ((decoded - tokens).square() * mask).sum((1, 2)) / mask.sum()

    def behavioral(decoded: Tensor, goal: Tensor, step: int) -> Tensor:
        """L_B of each network [n] on the queries of a step."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "refine", step))
        chosen = torch.randperm(len(inputs), generator=generator)[:count].to(inputs.device)
        found = behavior.logits(network, representation.weights(decoded), inputs[chosen], group)
        return distance(found, goal[:, chosen]).mean(1) / scale

    decoding, z = start, start.z
    for number in range(start.rounds):
        with torch.no_grad():
            decoding = representation.decoding(z) if number else start
            values, free = decoding.values, decoding.free(number)
            reach = torch.ones(len(z), 1, 1, device=z.device)
            if goal is not None:
                error = behavioral(decoding.tokens(values), goal, -1)
                reach = error.nan_to_num(FARTHEST**2).clamp(1, FARTHEST**2).sqrt()[:, None, None]
        moved = torch.zeros_like(values, requires_grad=True)
        optimizer = torch.optim.Adam([moved], config.learning_rate, DECAYS, ROUNDING)
        steps = range(config.steps * number // start.rounds, config.steps * (number + 1) // start.rounds)
        for done, step in enumerate(steps):
            for parameters in optimizer.param_groups:
                parameters["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done / len(steps)))
            with torch.enable_grad():
                decoded = decoding.tokens(values + reach * free * moved)
                each = structural(decoded)
                if goal is not None:
                    each = (1 - beta) * behavioral(decoded, goal, step) + beta * each
                (moved.grad,) = torch.autograd.grad(each.sum(), [moved])
            optimizer.step()
        z = decoding.embeddings(values + reach * free * moved).detach()
    return z


def behavioral_scale(info: Mapping[str, Any]) -> float:
    """The value by which a representation's behavioral loss is divided; of several zoos their mean."""
    scales = info["scales"] if isinstance(info["scales"], list) else [info["scales"]]
    return sum(each["behavioral"] for each in scales) / len(scales)
