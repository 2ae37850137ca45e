"""What many checkpoints output on one batch of inputs: the only place that runs checkpoints.

Loss, accuracy, agreement, population training and fine-tuning all call `logits`, so they cannot disagree. How many
checkpoints run in one vectorized call is measured once per machine (`calibrate`): small networks gain several times
from running together, larger convolutions are faster one after another in channels-last layout.

Legend: n checkpoints, Q queries, C classes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, notice, processor, write_json

GROUPS = (1, 8, 32, 64, 128, 256, 512, 1024)
"""Group sizes that calibration tries."""
ALONE = 4
"""Checkpoints over which calibration averages where they run one after another."""
ROUNDS = 6
"""How often calibration times each group size."""
CONDITION_BATCH = 256
"""Images per batch on which statistics of batch normalizations are measured."""
IMAGES_AT_ONCE = 32_768
"""Upper bound on checkpoints x inputs in one vectorized call, so that memory stays bounded."""
VALUES_AT_ONCE = 2**23
"""The same on a CPU for checkpoints x inputs x values of an input: what networks keep of an input grows with it."""


@dataclass(frozen=True)
class Outputs:
    """What n checkpoints give on Q queries."""

    logits: Tensor
    """[n, Q, C]; of networks that represent a signal, its values"""
    labels: Tensor | None = None
    """[Q] class indices, or values [Q, C], where the queries have them."""

    @property
    def real(self) -> bool:
        """Whether the outputs are values, not logits of classes."""
        return self.labels is not None and self.labels.is_floating_point()

    @property
    def predictions(self) -> Tensor:
        """Predicted class [n, Q], or the values [n, Q, C]."""
        return self.logits if self.real else self.logits.argmax(-1)

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits [n, Q, C], or the values."""
        return self.logits if self.real else self.logits.softmax(-1)

    @property
    def accuracy(self) -> Tensor:
        """Agreement with the labels [n]: share of the queries whose label is predicted, or 1 - mean squared error."""
        return agreement(self.predictions, self._labels().expand_as(self.predictions))

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy, or mean squared error, per checkpoint [n]."""
        if self.real:
            return 1 - self.accuracy
        classes = self.logits.shape[-1]
        labels = self._labels().expand(len(self.logits), -1)
        losses = F.cross_entropy(self.logits.reshape(-1, classes), labels.reshape(-1), reduction="none")
        return losses.view(labels.shape).mean(1)

    def _labels(self) -> Tensor:
        if self.labels is None:
            raise UserError("these outputs have no labels; pass the labels to outputs(checkpoints, inputs, labels)")
        return self.labels


def agreement(predictions: Tensor, others: Tensor) -> Tensor:
    """How much networks do alike, row by row: [n, Q] or [n, Q, C] twice -> [n].

    Of classes [n, Q] it is the share of queries with the same one. Of values [n, Q, C] it is one minus their mean
    squared difference; tasks are normalized, so that 0 is as far apart as values of different images, about.
    """
    if predictions.is_floating_point():
        return 1 - (predictions - others).square().flatten(1).mean(1)
    return (predictions == others).float().mean(1)


def runner(architecture: Architecture, device: torch.device | str = "cpu") -> nn.Module:
    """An instance of a base network to run checkpoints with; in evaluation mode.

    Its batch normalizations are differentiable in their running statistics, which torch's own are not.
    """
    network = architecture.build().to(device)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__dict__["forward"] = partial(_batch_norm, module, module.forward)
    return network


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Batch normalization [B, C, ...] by plain arithmetic where the running statistics are used, else torch's own.

    A variance below zero, as noise or linear maps make them, counts as zero.
    """
    if module.training or module.running_mean is None or module.running_var is None:
        return whole(x)
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = (module.running_var.clamp(min=0) + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight
    shift = -module.running_mean * scale
    shift = shift if module.bias is None else shift + module.bias
    return x * scale.view(shape) + shift.view(shape)


def logits(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor, group: int, shared: bool = True) -> Tensor:
    """Logits of n checkpoints [n, Q, C]; differentiable in the weights and the inputs.

    Args:
        network: any instance of the base network (`runner`); its own weights play no part.
        weights: {name: [n, *shape]}.
        inputs: [Q, ...], the same for every checkpoint, or [n, Q, ...] where `shared` is False.
        group: how many checkpoints run in one vectorized call; 1 runs them one after another.
    """
    count = len(next(iter(weights.values())))
    if group == 1:
        if shared:
            same = _channels_last(inputs)
            each = [same] * count
        else:
            each = [_channels_last(own) for own in inputs]
        alone = zip(*(weight.unbind() for weight in weights.values()), strict=True)
        return torch.stack(
            [
                functional_call(network, dict(zip(weights, w, strict=True)), (x,))
                for w, x in zip(alone, each, strict=True)
            ]
        )
    run = vmap(
        lambda w, x: functional_call(network, w, (x,)), in_dims=(0, None if shared else 0), randomness="different"
    )
    chunks = zip(*(weight.split(group) for weight in weights.values()), strict=True)
    each = [inputs] * math.ceil(count / group) if shared else inputs.split(group)
    with plain_attention():
        parts = [run(dict(zip(weights, w, strict=True)), x) for w, x in zip(chunks, each, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gradients(
    network: nn.Module, weights: dict[str, Tensor], inputs: Tensor, real: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """How one checkpoint's outputs move with its weights: a random gradient per input, {name: [Q, *shape]}.

    Of logits it is the gradient of the log-probability of a class drawn from the network's own probabilities; of
    values, of their product with a random normal vector. The mean of its square is the Gauss-Newton matrix of KL, or of
    half the squared error (Martens 2020, arXiv 1412.1193, section 9).

    Args:
        network: any instance of the base network (`runner`).
        weights: {name: shape}, of one checkpoint.
        inputs: [Q, ...].
        real: whether the outputs are values, not logits.
        generator: randomness of the classes or vectors.
    """

    def moved(own: dict[str, Tensor], x: Tensor, draw: Tensor) -> Tensor:
        output = functional_call(network, own, (x[None],))[0]  # [C]
        if real:
            return output @ draw
        found = output.log_softmax(-1)
        drawn = (found.detach().exp().cumsum(-1) < draw[0]).sum().clamp(max=len(found) - 1)
        return found.gather(0, drawn[None])[0]

    with torch.no_grad():
        classes = functional_call(network, weights, (inputs[:1],)).shape[-1]
    draw = torch.randn if real else torch.rand
    draws = draw(len(inputs), classes, generator=generator).to(inputs.device)
    with plain_attention():
        return vmap(grad(moved), (None, 0, 0), randomness="different")(weights, inputs, draws)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain products: torch's fused kernels cannot be vectorized over checkpoints.

    The switch is one for the whole process: around several threads it has to be set before they start.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def activations(
    network: nn.Module, weights: dict[str, Tensor], inputs: Tensor, layers: Sequence[str], together: bool = True
) -> dict[str, Tensor]:
    """What some layers of n checkpoints put out on the same inputs: {layer: [n, Q, ...]}.

    Layers that the network does not call as modules, as the projections within attention, are absent.

    Args:
        network: any instance of the base network (`runner`).
        weights: {name: [n, *shape]}.
        inputs: [Q, ...].
        layers: names of modules that give one tensor.
        together: in one vectorized call, not one after another.
    """

    def run(own: dict[str, Tensor]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, given: object, output: Tensor) -> None:
            kept[name] = output

        hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
        try:
            functional_call(network, own, (inputs,))
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    if not together:
        each = [run(dict(zip(weights, row, strict=True))) for row in zip(*weights.values(), strict=True)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}
    with plain_attention():
        return vmap(run, randomness="different")(weights)


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


@torch.no_grad()
def outputs(checkpoints: Checkpoints, inputs: Tensor, labels: Tensor | None = None) -> Outputs:
    """Outputs of every checkpoint on the same inputs [Q, ...], in bounded memory, on the inputs' device."""
    device = inputs.device
    network = runner(checkpoints.architecture, device)
    group = calibrate(checkpoints.architecture, device, min(len(inputs), 256), len(checkpoints))
    most = inputs_at_once(math.prod(inputs.shape[1:]), device)
    rows = max(group, min(256, most // len(inputs)), 1)  # checkpoints moved to the device at once
    queries = max(most // group, 1)
    parts = []
    for start in range(0, len(checkpoints), rows):
        weights = {name: weight[start : start + rows].to(device) for name, weight in checkpoints.weights.items()}
        parts.append(torch.cat([logits(network, weights, batch, group) for batch in inputs.split(queries)], dim=1))
    return Outputs(torch.cat(parts), labels)


def inputs_at_once(values: int, device: torch.device) -> int:
    """Upper bound on checkpoints x inputs in one vectorized call, for inputs of so many values."""
    return IMAGES_AT_ONCE if device.type == "cuda" else max(min(IMAGES_AT_ONCE, VALUES_AT_ONCE // values), 1)


@torch.no_grad()
def conditioned(checkpoints: Checkpoints, images: Tensor) -> Checkpoints:
    """The same checkpoints with the statistics of their batch normalizations measured on images [N, C, H, W].

    Every network runs over the images once; its running means and variances become the averages over the batches.
    Networks without batch normalization come back as they are.
    """
    network = checkpoints.architecture.build().to(images.device)
    layers = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return checkpoints
    for layer in layers:
        layer.train()
        layer.momentum = None  # a plain average
    weights = {name: weight.clone() for name, weight in checkpoints.weights.items()}
    for row in range(len(checkpoints)):
        for layer in layers:
            layer.reset_running_stats()
        own = {name: weight[row].to(images.device, copy=True) for name, weight in weights.items()}
        for batch in images.split(CONDITION_BATCH):
            functional_call(network, own, (batch,))
        for name in checkpoints.architecture.buffers:
            weights[name][row] = own[name]
    return Checkpoints(checkpoints.architecture, weights, checkpoints.frame)


def calibrate(
    architecture: Architecture,
    device: torch.device,
    queries: int,
    count: int,
    shared: bool = True,
    training: bool = False,
    threads: int | None = None,
) -> int:
    """The group size that runs `count` checkpoints fastest, measured once and remembered for this machine.

    Args:
        architecture: the base network.
        device: where it runs.
        queries: inputs per checkpoint.
        count: how many checkpoints there are; larger groups are not tried.
        shared: whether all checkpoints see the same inputs.
        training: whether gradients are needed.
        threads: intra-op threads, by default as many as now in use.
    """
    seconds = timings(architecture, device, queries, count, shared, training, threads)
    return min(seconds, key=lambda group: seconds[group])


def timings(
    architecture: Architecture,
    device: torch.device,
    queries: int,
    count: int,
    shared: bool = True,
    training: bool = False,
    threads: int | None = None,
) -> dict[int, float]:
    """Seconds per checkpoint for each group size up to `count`, measured once and remembered; see `calibrate`."""
    now = torch.get_num_threads()
    threads = threads or now
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    most = inputs_at_once(math.prod(input_shape_of(architecture.build())), device)
    several = vectorized(architecture)
    groups = [size for size in GROUPS if size == 1 or (several and size <= count and size * queries <= most)]
    cache = calibration_file()
    known = _known(cache)
    keys = {
        size: f"{architecture.name} {json.dumps(architecture.arguments, sort_keys=True)} | {name} {threads} threads | "
        f"torch {torch.__version__} | {queries} {'shared' if shared else 'own'} inputs | "
        f"{'forward and backward' if training else 'forward'} | group {size}"
        for size in groups
    }
    missing = [size for size in groups if keys[size] not in known]
    if missing:
        torch.set_num_threads(threads)
        try:
            calls = {size: _call(architecture, device, queries, size, shared, training) for size in missing}
            for call in calls.values():
                call()  # warm-up
            best = dict.fromkeys(missing, math.inf)
            for number in range(ROUNDS):  # the best of several rounds, the sizes in turn: machines are noisy
                for size, call in calls.items():
                    if number < 2 or best[size] < 2 * min(best.values()):  # out of the race after two rounds
                        best[size] = min(best[size], _timed(call) / max(size, ALONE))
            known.update({keys[size]: seconds for size, seconds in best.items()})
        finally:
            torch.set_num_threads(now)
        with suppress(OSError):  # a home that cannot be written costs the time to measure again
            write_json(cache, {**_known(cache), **known})
    return {size: known[keys[size]] for size in groups}


_vectorized: dict[str, bool] = {}


def vectorized(architecture: Architecture) -> bool:
    """Whether several checkpoints can run in one call, in evaluation and in training.

    If not, they run one after another, which is told.

    Raises:
        UserError: the network cannot be run at all: the call fails, its outputs are not one row of numbers per input,
            they change from call to call in evaluation mode, or no gradient reaches its weights.
    """
    key = str(architecture)
    if key not in _vectorized:
        _vectorized[key] = _tried(architecture)
    return _vectorized[key]


@torch.enable_grad()
def _tried(architecture: Architecture) -> bool:
    network, generator = runner(architecture), torch.Generator().manual_seed(0)
    inputs = torch.randn(3, *input_shape_of(network), generator=generator)
    weights = {name: 0.1 * torch.randn(2, *shape, generator=generator) for name, shape in architecture.shapes.items()}

    def outputs(group: int) -> Tensor:
        return logits(network, {name: weight.clone() for name, weight in weights.items()}, inputs, group)

    try:  # whatever the code of others raises
        given: object = network(inputs)
        alone = outputs(1) if isinstance(given, Tensor) else None
    except Exception as error:
        raise UserError(f"{architecture} cannot be called with inputs {list(inputs.shape)}: {_line(error)}") from None
    if alone is None or alone.ndim != 3 or alone.shape[1] != len(inputs):
        found = list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise UserError(f"{architecture} gives {found} for inputs {list(inputs.shape)}, not a tensor [3, classes]")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = network(inputs), network(inputs)
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, state[name])]
    if changed or not torch.allclose(first, second, equal_nan=True):
        reason = f"changes {', '.join(changed)}" if changed else "draws at random"
        raise UserError(
            f"{architecture} {reason} when it is called in evaluation mode, so that its behavior is not one function; "
            "let it do that in training mode only"
        )
    wanted = {name: weight.requires_grad_() for name, weight in weights.items() if name not in architecture.buffers}
    values = outputs(1).sum()
    reached = torch.autograd.grad(values, list(wanted.values()), allow_unused=True) if values.requires_grad else ()
    trained = [name for name, gradient in zip(wanted, reached, strict=bool(reached)) if gradient is not None]
    if not trained:
        raise UserError(f"no gradient reaches the weights of {architecture}; its forward pass may leave torch (numpy)")
    if missed := [name for name in wanted if name not in trained]:
        more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
        notice(f"no gradient reaches {', '.join(missed[:4])}{more} of {architecture}: they stay as they begin")
    try:
        same = torch.allclose(outputs(2), alone, rtol=1e-3, atol=1e-4, equal_nan=True)
        reason = "" if same else "vectorized it gives other outputs"
        with torch.random.fork_rng([]):
            network.train()  # as populations are trained; what it draws differs, so that outputs cannot be compared
            beside = {name: (b, b.clone()) for name, b in network.named_buffers() if name not in state}
            outputs(2)
        now = dict(network.named_buffers())
        if own := [name for name, (b, old) in beside.items() if now[name] is not b or not torch.equal(b, old)]:
            reason = f"in training it changes {', '.join(own)} beside its state_dict, which checkpoints do not keep"
    except Exception as error:  # as above
        reason = _line(error)
    if reason:
        notice(f"the checkpoints of {architecture} run one after another, not vectorized ({reason})")
    return not reason


def _line(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". We don't")[0][:200]


def _known(cache: Path) -> dict[str, float]:
    """What was measured before; nothing where the file is missing or damaged, since it can be measured again."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def calibration_file() -> Path:
    """Where measured strategies are remembered: $XDG_CACHE_HOME/weightspace/calibration.json; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weightspace" / "calibration.json"


def input_shape_of(network: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) of the images that a base network takes, or (2,) for coordinates.

    Raises:
        UserError: it does not say.
    """
    if not hasattr(network, "input_shape"):
        raise UserError(
            f"the base network {type(network).__name__} does not say what it takes; give its modules an attribute "
            "input_shape = (channels, height, width), or (2,) for coordinates; where its code is not yours, say it as "
            "an argument of the network: input_shape=[3,32,32]"
        )
    return cast(tuple[int, ...], network.input_shape)


def _call(
    architecture: Architecture, device: torch.device, queries: int, group: int, shared: bool, training: bool
) -> Callable[[], None]:
    """One call at this group size, to be timed."""
    network = runner(architecture, device)
    count = max(group, ALONE)
    generator = torch.Generator().manual_seed(0)
    weights = {n: 0.1 * torch.randn(count, *s, generator=generator) for n, s in architecture.shapes.items()}
    weights = {name: weight.to(device).requires_grad_(training) for name, weight in weights.items()}
    batch = [queries] if shared else [count, queries]
    inputs = torch.randn(*batch, *input_shape_of(network), generator=generator).to(device)

    def call() -> None:
        with torch.set_grad_enabled(training):
            result = logits(network, weights, inputs, group, shared)
            if training:
                torch.autograd.grad(result.square().sum(), list(weights.values()), allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
