"""Permutation groups found by tracing: which hidden units of a network can be reordered, and what has to follow.

The network is traced with torch.fx. Every axis of every value in its graph either is *fixed* (images, positions in a
sequence, classes) or carries the units of a *space*: a set of hidden units that may be reordered together. A layer
opens a space for its outputs and ties the space of its inputs to its weights; a sum makes two spaces one; whatever is
not known fixes the spaces that reach it. What remains are the groups. They are checked by running the permuted
network, so that a mistake here costs a group and never a wrong view.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from weightspace.networks.groups import Axis, PermutationGroup

ELEMENTWISE = {
    F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.selu, F.hardtanh, F.hardswish, F.mish, F.softplus, F.dropout,
    F.sigmoid, F.tanh, torch.relu, torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.exp, torch.abs,
    torch.square, torch.clamp, operator.neg,
}  # fmt: skip
"""Functions of each entry alone."""
ELEMENTWISE_METHODS = {
    "relu", "tanh", "sigmoid", "sin", "cos", "exp", "abs", "square", "clamp", "contiguous", "clone", "detach", "float",
    "neg",
}  # fmt: skip
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Mish,
    nn.Softplus, nn.ReLU6, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip
BINARY = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    operator.imul,
    torch.add,
    torch.sub,
    torch.mul,
}
POOLING = {
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
POOLING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip


@dataclass
class Space:
    """Hidden units that move together."""

    size: int
    axes: list[Axis] = field(default_factory=list)
    fixed: bool = False
    into: Space | None = None
    """the space that this one became part of"""

    def root(self) -> Space:
        return self if self.into is None else self.into.root()


@dataclass(frozen=True)
class Units:
    """An axis of a value: the units of a space, each as `repeat` consecutive entries."""

    space: Space
    repeat: int = 1


Dim = Units | None
"""None: fixed, nothing of it may be reordered."""
Dims = tuple[Dim, ...]


class UntraceableNetwork(Exception):
    """The network cannot be traced; the message says why."""


def derive_groups(network: nn.Module, inputs: Tensor) -> tuple[PermutationGroup, ...]:
    """The permutation groups of a network in evaluation mode, unchecked; in the order of its layers.

    Args:
        network: the network.
        inputs: an example of its inputs [B, ...].

    Raises:
        UntraceableNetwork: its course depends on data, or it cannot be run.
    """
    try:
        traced = fx.symbolic_trace(network)
        ShapeProp(traced).propagate(inputs)
    except Exception as error:  # whatever the network's own code raises when it meets a proxy
        raise UntraceableNetwork(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from None
    return _Graph(network, traced).groups()


class _Graph:
    """The walk over the nodes of a traced network."""

    def __init__(self, network: nn.Module, traced: fx.GraphModule) -> None:
        self.network = network
        self.modules = dict(traced.named_modules())
        self.spaces: list[Space] = []
        self.places: dict[tuple[str, int], tuple[Dim, int]] = {}
        first: dict[int, str] = {}
        state = network.state_dict(keep_vars=True)
        self.names = {name: first.setdefault(id(value), name) for name, value in state.items()}
        self.dims: dict[fx.Node, Any] = {}
        for node in traced.graph.nodes:
            self.dims[node] = self._step(node)

    def groups(self) -> tuple[PermutationGroup, ...]:
        """What may be reordered."""
        roots = list({id(space.root()): space.root() for space in self.spaces}.values())
        return tuple(
            PermutationGroup(space.size, tuple(space.axes)) for space in roots if not space.fixed and space.size > 1
        )

    # spaces

    def _open(self, size: int) -> Units:
        self.spaces.append(Space(size))
        return Units(self.spaces[-1])

    @staticmethod
    def _fix(dims: Dims) -> None:
        for dim in dims:
            if dim is not None:
                dim.space.root().fixed = True

    def _join(self, left: Dim, right: Dim) -> Dim:
        """Two axes that meet entry by entry become one."""
        if left is None or right is None or left.repeat != right.repeat:
            self._fix((left, right))
            return None
        one, other = left.space.root(), right.space.root()
        if one is not other:
            one.axes += [axis for axis in other.axes if axis not in one.axes]
            one.fixed |= other.fixed
            other.into = one
        return left

    def _tie(self, name: str, axis: int, dim: Dim, blocks: int = 1) -> None:
        """The units of an axis of a value are those of an axis of a weight."""
        name = self.names[name]
        if (name, axis) in self.places:  # a weight that is used twice
            before, there = self.places[name, axis]
            if there != blocks:
                self._fix((before, dim))
            self._join(before, dim)
            return
        self.places[name, axis] = (dim, blocks)
        if dim is not None:
            dim.space.root().axes.append(Axis(name, axis, dim.repeat, blocks))

    # nodes

    def _step(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return (None,) * _rank(node)
        if node.op == "output":
            self._fix_all(node)
            return ()
        if node.op == "get_attr":
            return self._weight(str(node.target))
        if node.op == "call_module":
            return self._module(node, str(node.target), self.modules[str(node.target)])
        name = node.target if node.op == "call_method" else None
        return self._function(node, node.target if name is None else None, str(name))

    def _of(self, value: Any) -> Dims:
        """The axes of an argument; none of a number."""
        return self.dims[value] if isinstance(value, fx.Node) and isinstance(self.dims[value], tuple) else ()

    def _fix_all(self, node: fx.Node) -> Any:
        """What is not known: everything that reaches it stays as it is."""
        for argument in node.all_input_nodes:
            known = self.dims[argument]
            self._fix(known if isinstance(known, tuple) else ())
        return (None,) * _rank(node)

    def _weight(self, name: str) -> Dims:
        """A free parameter or a buffer: its own units, axis by axis; they are fixed by what they meet."""
        if name not in self.names:
            return ()
        value = self.network.state_dict(keep_vars=True)[name]
        dims: list[Dim] = []
        for axis, size in enumerate(value.shape):
            dim = self._open(size) if size > 1 else None
            if dim is not None:
                self._tie(name, axis, dim)
            dims.append(dim)
        return tuple(dims)

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> Any:
        x = self._of(node.args[0]) if node.args else ()
        if isinstance(module, ELEMENTWISE_MODULES):
            return x
        if isinstance(module, POOLING_MODULES):
            return self._pooled(x)
        if isinstance(module, nn.Flatten):
            return self._reshaped(node)
        if isinstance(module, nn.Linear):
            return (*x[:-1], self._layer(name, module, _last(x)))
        if isinstance(module, nn.Conv1d | nn.Conv2d) and len(x) == _rank(node):
            axis = 1 if len(x) == module.weight.ndim else 0
            self._fix(x[axis + 1 :])
            return (*x[:axis], self._convolution(name, module, x[axis]), *(None for _ in x[axis + 1 :]))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and len(x) > 1:
            self._own(name, module, x[1])
            return x
        if isinstance(module, nn.GroupNorm) and module.num_groups == 1 and len(x) > 1:
            self._own(name, module, x[1])
            return x
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
            self._own(name, module, _last(x))
            return x
        if isinstance(module, nn.Embedding):
            self._fix(x)
            units = self._open(module.embedding_dim)
            self._tie(f"{name}.weight", 1, units)
            return (*(None for _ in x), units)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None and module.bias_k is None:
            return self._attention(node, name, module)
        return self._fix_all(node)

    def _own(self, name: str, module: nn.Module, dim: Dim) -> None:
        """Scales, shifts and statistics of the units that pass through."""
        for key in ("weight", "bias", "running_mean", "running_var"):
            if f"{name}.{key}" in self.names:
                self._tie(f"{name}.{key}", 0, dim)

    def _layer(self, name: str, module: nn.Linear | nn.Conv1d | nn.Conv2d, inputs: Dim) -> Dim:
        units = self._open(len(module.weight))
        self._tie(f"{name}.weight", 0, units)
        if module.bias is not None:
            self._tie(f"{name}.bias", 0, units)
        self._tie(f"{name}.weight", 1, inputs)
        return units

    def _convolution(self, name: str, module: nn.Conv1d | nn.Conv2d, inputs: Dim) -> Dim:
        if module.groups == 1:
            return self._layer(name, module, inputs)
        if inputs is None or module.groups != module.in_channels:
            self._fix((inputs,))
            return None
        outputs = Units(inputs.space, inputs.repeat * (module.out_channels // module.in_channels))  # depthwise
        self._tie(f"{name}.weight", 0, outputs)
        if module.bias is not None:
            self._tie(f"{name}.bias", 0, outputs)
        return outputs

    def _attention(self, node: fx.Node, name: str, module: nn.MultiheadAttention) -> Any:
        """Heads may be reordered, and so may the inputs (of all three alike) and the outputs."""
        inputs = [self._of(value) for value in node.args[:3]]
        if len(inputs) < 3 or len(node.args) > 3 or any(not dims for dims in inputs):
            return self._fix_all(node)
        for dims in inputs:
            self._fix(dims[:-1])
        units = self._join(self._join(inputs[0][-1], inputs[1][-1]), inputs[2][-1])
        self._tie(f"{name}.in_proj_weight", 1, units)
        heads = Units(self._open(module.num_heads).space, module.head_dim)
        self._tie(f"{name}.in_proj_weight", 0, heads, blocks=3)
        if module.in_proj_bias is not None:
            self._tie(f"{name}.in_proj_bias", 0, heads, blocks=3)
        outputs = self._layer(f"{name}.out_proj", module.out_proj, heads)
        return [(*inputs[0][:-1], outputs), None]

    def _pooled(self, x: Dims) -> Dims:
        self._fix(x[2:])
        return (*x[:2], *(None for _ in x[2:]))

    def _function(self, node: fx.Node, function: Any, method: str) -> Any:
        first = node.args[0] if node.args else None
        x = self._of(first)
        if function in ELEMENTWISE or method in ELEMENTWISE_METHODS:
            return x
        if function in (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax) or method == "softmax":
            return x
        if function in BINARY or method in ("add", "sub", "mul", "div"):
            return self._met(node)
        if function in POOLING:
            return self._pooled(x)
        if function is operator.getitem and isinstance(first, fx.Node) and isinstance(self.dims[first], list):
            return self.dims[first][node.args[1]] or ()
        if function in (torch.flatten, torch.reshape) or method in (
            "flatten",
            "view",
            "reshape",
            "squeeze",
            "unsqueeze",
        ):
            return self._reshaped(node)
        if function is torch.transpose or method == "transpose":
            order, swapped = list(range(len(x))), [axis % len(x) for axis in _integers(node.args[1:3])]
            order[swapped[0]], order[swapped[1]] = swapped[1], swapped[0]
            return tuple(x[axis] for axis in order)
        if function is torch.permute or method == "permute":
            return tuple(x[axis % len(x)] for axis in _integers(node.args[1:]))
        if function in (torch.mean, torch.sum, torch.amax) or method in ("mean", "sum", "amax"):
            return self._reduced(node, x)
        if function is getattr or method in ("size", "dim"):
            return ()
        if not isinstance(node.meta.get("tensor_meta"), tuple) and not x:
            return ()  # arithmetic of sizes
        return self._fix_all(node)

    def _met(self, node: fx.Node) -> Dims:
        """Two values entry by entry, with broadcasting."""
        left, right = (self._of(value) for value in node.args[:2])
        rank = _rank(node)
        sides = [(None,) * (rank - len(dims)) + dims for dims in (left, right)]
        sizes = [(1,) * (rank - len(shape)) + shape for shape in (_shape(value) for value in node.args[:2])]
        dims: list[Dim] = []
        for axis in range(rank):
            one, other = sizes[0][axis], sizes[1][axis]
            if one == 1 or other == 1:  # broadcast: the same for every unit
                dims.append(sides[1][axis] if one == 1 and other != 1 else sides[0][axis])
            else:
                dims.append(self._join(sides[0][axis], sides[1][axis]))
        return tuple(dims)

    def _reduced(self, node: fx.Node, x: Dims) -> Dims:
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if over is None:
            return ()
        axes = {axis % len(x) for axis in _integers((over,))}
        keeps = (len(node.args) > 2 and bool(node.args[2])) or bool(node.kwargs.get("keepdim"))
        kept = [None if axis in axes else dim for axis, dim in enumerate(x) if keeps or axis not in axes]
        return tuple(kept)

    def _reshaped(self, node: fx.Node) -> Dims:
        """Axes that are joined carry the units of the first of them; an axis that is cut is fixed."""
        x, before, after = self._of(node.args[0]), _shape(node.args[0]), _shape(node)
        dims: list[Dim] = []
        i = j = 0
        while i < len(before) or j < len(after):
            start, first = i, j
            left = before[i] if i < len(before) else 1
            right = after[j] if j < len(after) else 1
            i, j = min(i + 1, len(before)), min(j + 1, len(after))
            while left != right:
                if left < right:
                    left, i = left * before[i], i + 1
                else:
                    right, j = right * after[j], j + 1
            dims += self._merged(x[start:i], before[start:i], after[first:j])
        return tuple(dims)

    def _merged(self, x: Dims, before: Sequence[int], after: Sequence[int]) -> Dims:
        """Neighboring axes `x` of sizes `before` that become axes of sizes `after`."""
        large = [axis for axis, size in enumerate(before) if size > 1]
        places = [axis for axis, size in enumerate(after) if size > 1]
        if not large or len(places) > 1:
            self._fix(x)
            return (None,) * len(after)
        lead, rest = large[0], large[1:]
        self._fix(tuple(x[axis] for axis in rest))
        dim = x[lead]
        joined = None if dim is None else Units(dim.space, dim.repeat * math.prod(before[axis] for axis in rest))
        return tuple(joined if axis in places else None for axis in range(len(after)))


def _last(dims: Dims) -> Dim:
    return dims[-1] if dims else None


def _shape(value: Any) -> tuple[int, ...]:
    meta: Any = value.meta.get("tensor_meta") if isinstance(value, fx.Node) else None
    return tuple(meta.shape) if hasattr(meta, "shape") else ()


def _integers(values: Any) -> list[int]:
    """The whole numbers of nested tuples and lists, one after another."""
    return [n for value in values for n in (_integers(value) if isinstance(value, tuple | list) else [int(value)])]


def _rank(node: fx.Node) -> int:
    return len(_shape(node))
