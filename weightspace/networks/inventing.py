"""Query inputs made from networks alone: no image of their task is needed.

An input is moved until networks of a zoo find two classes in it at once: there, near the boundaries between classes,
good networks differ. Inputs that one class fills alone (class impressions: Mopuri et al. 2018, arXiv 1801.05411) are
the case of equal classes.

Legend: m networks, N inputs, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints

STEPS = 60
"""Gradient steps per input."""
RATE = 0.15
"""Step size of Adam, in units of the inputs' standard deviation where they are normalized."""
MEMBERS = 8
"""Networks that look at an input."""
BATCH = 64
"""Inputs that the same networks look at."""


def invented(
    checkpoints: Checkpoints, shape: torch.Size, low: Tensor, high: Tensor, generator: torch.Generator
) -> Tensor:
    """Inputs of this shape [N, ...] between low and high in which random networks find mixtures of two classes."""
    network = behavior.runner(checkpoints.architecture, low.device)
    count = min(MEMBERS, len(checkpoints))
    group = behavior.calibrate(checkpoints.architecture, low.device, BATCH, count, training=True)
    made = []
    for start in range(0, shape[0], BATCH):
        size = min(BATCH, shape[0] - start)
        few = torch.randperm(len(checkpoints), generator=generator)[:count]
        weights = checkpoints.rows(few.numpy()).to(low.device).weights
        inputs = (low + (high - low) * torch.rand(size, *shape[1:], generator=generator).to(low)).requires_grad_()
        with torch.no_grad():
            classes = behavior.logits(network, weights, inputs[:1], group).shape[-1]
        goal = _mixtures(size, classes, generator).to(low)  # [N, C]
        optimizer = torch.optim.Adam([inputs], RATE)
        for _ in range(STEPS):
            with torch.enable_grad():
                found = behavior.logits(network, weights, inputs, group).log_softmax(-1)  # [m, N, C]
                (inputs.grad,) = torch.autograd.grad(-(goal * found).sum((1, 2)).mean(), [inputs])
            optimizer.step()
            with torch.no_grad():
                inputs.clamp_(low, high)
        made.append(inputs.detach())
    return torch.cat(made)


def _mixtures(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Probabilities [count, classes] of two random classes each, mixed at random."""
    share = torch.rand(count, 1, generator=generator)
    goal = torch.zeros(count, classes)
    for part in (share, 1 - share):
        goal.scatter_add_(1, torch.randint(classes, (count, 1), generator=generator), part)
    return goal
