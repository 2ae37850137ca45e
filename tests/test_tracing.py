"""Permutation groups found by tracing: equal to hand-written ones, true of every network, else dropped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightspace.networks import symmetry
from weightspace.networks.architectures import NETWORKS, Architecture
from weightspace.networks.behavior import logits
from weightspace.networks.groups import Axis, PermutationGroup
from weightspace.networks.symmetry import align, groups_of, permute, random_permutations

CHAINS = {
    "CNN8": ("conv1", "conv2", "fc1", "fc2"),
    "CNN3": ("conv1", "conv2", "conv3", "fc1", "fc2"),
    "CNN": ("conv1", "conv2", "conv3", "fc1", "fc2"),
    "LeNet5": ("conv1", "conv2", "fc1", "fc2", "fc3"),
    "SmallCNN": ("conv1", "conv2", "conv3", "fc"),
    "MLP": ("fc1", "fc2", "fc3"),
}
RESIDUAL = [
    Architecture("ResNet18", {"channels": 1, "size": 8, "width": 4}),
    Architecture("ViT", {"channels": 1, "size": 8, "width": 8, "depth": 2, "heads": 2}),
    Architecture("MLPMixer", {"channels": 1, "size": 8, "width": 8, "depth": 2}),
]


def registered(monkeypatch: pytest.MonkeyPatch, factory: Callable[[], nn.Module]) -> Architecture:
    monkeypatch.setitem(NETWORKS, "Own", factory)
    return Architecture("Own")


def random_weights(architecture: Architecture, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.3 * torch.randn(count, *shape, generator=generator) for name, shape in architecture.shapes.items()}
    return {name: weight.abs() + 0.5 if name.endswith("_var") else weight for name, weight in drawn.items()}


def outputs_kept(architecture: Architecture, shape: tuple[int, ...]) -> float:
    """Largest change of the logits under random permutations of all groups together, over their size."""
    weights, groups = random_weights(architecture, 3), groups_of(architecture)
    moved = permute(weights, groups, random_permutations(groups, 3, torch.Generator().manual_seed(1)))
    assert any(not torch.equal(moved[name], weight) for name, weight in weights.items())
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))
    before, after = (logits(architecture.build(), each, x, 1) for each in (weights, moved))
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_sequential_networks_as_by_hand(name: str) -> None:
    architecture = Architecture(name)
    expected = []
    for layer, after in pairwise(CHAINS[name]):
        size, inputs = architecture.shapes[f"{layer}.weight"][0], architecture.shapes[f"{after}.weight"][1]
        axes = (Axis(f"{layer}.weight", 0), Axis(f"{layer}.bias", 0), Axis(f"{after}.weight", 1, inputs // size))
        expected.append(PermutationGroup(size, axes))
    assert groups_of(architecture) == tuple(expected)


@pytest.mark.parametrize("architecture", RESIDUAL, ids=lambda each: each.name)
def test_residual_networks_keep_their_function(architecture: Architecture) -> None:
    assert outputs_kept(architecture, (1, 8, 8)) < 1e-4


def test_what_a_residual_network_has() -> None:
    resnet, vit, mixer = (groups_of(architecture) for architecture in RESIDUAL)
    assert [group.size for group in resnet] == [
        4,
        4,
        4,
        8,
        8,
        8,
        16,
        16,
        16,
        32,
        32,
        32,
    ]  # one stream a stage, one inside each block
    stream = {axis.parameter for axis in resnet[0].axes}
    assert {"conv.weight", "bn.running_var", "stages.0.1.conv2.weight", "stages.1.0.shortcut.0.weight"} <= stream
    heads = [group for group in vit if group.size == 2]
    assert [axis.blocks for axis in heads[0].axes] == [3, 3, 1] and {axis.repeat for axis in heads[0].axes} == {4}
    assert len(vit) == 1 + 2 * 2 and len(mixer) == 1 + 2 * 2
    assert any(axis.parameter == "positions" and axis.dim == 2 for axis in vit[0].axes)


@pytest.mark.parametrize("architecture", RESIDUAL, ids=lambda each: each.name)
def test_alignment_undoes_a_permutation(architecture: Architecture) -> None:
    weights, groups = random_weights(architecture, 2), groups_of(architecture)
    moved = permute(weights, groups, random_permutations(groups, 2, torch.Generator().manual_seed(1)))

    def distance(one: dict[str, Tensor]) -> float:
        return sum(float((one[name] - weights[name]).square().sum()) for name in weights) ** 0.5

    assert distance(align(moved, weights, groups)) < 0.5 * distance(moved)


class Gated(nn.Module):
    """Depthwise convolution, a gate per channel, two branches joined, a reshape, a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.depthwise = nn.Conv2d(6, 12, 3, groups=6)
        self.point = nn.Conv2d(12, 4, 1)
        self.norm = nn.GroupNorm(1, 4)
        self.squeeze = nn.Linear(4, 3)
        self.excite = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.shared = nn.Linear(4, 4)
        self.fc = nn.Linear(4 * 16, 5)
        self.input_shape = (1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.point(torch.relu(self.depthwise(self.conv(x)))))  # [B, 4, 4, 4]
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(h.mean(dim=(2, 3))))))
        h = 2 * h * gate.unsqueeze(-1).unsqueeze(-1) + self.scale * h
        pooled = F.softmax(h.mean((2, 3)), -1)
        twice = self.shared(torch.relu(self.shared(pooled)))
        return self.fc(h.reshape(x.shape[0], -1)) + twice.sum(1, keepdim=True)


def test_gates_depthwise_and_shared_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = registered(monkeypatch, Gated)
    groups = groups_of(architecture)
    named = {axis.parameter: (group.size, axis.repeat) for group in groups for axis in group.axes}
    assert named["conv.weight"] == (6, 1) and named["depthwise.weight"] == (6, 2) and named["point.weight"] == (4, 1)
    assert named["squeeze.bias"] == (3, 1) and named["scale"] == named["excite.bias"] == (4, 1)
    assert named["fc.weight"] == (4, 16)
    assert named["shared.bias"] == (4, 1)  # its outputs are its inputs: one group with everything before it
    assert outputs_kept(architecture, (1, 8, 8)) < 1e-4


class Sorted(nn.Module):
    """Between its layers stands something that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.input_shape = (4,)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cumsum(self.first(x), 1)
        return self.third(torch.relu(self.second(h)))


def test_what_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = groups_of(registered(monkeypatch, Sorted))
    assert group.size == 5 and [axis.parameter for axis in group.axes] == [
        "second.weight",
        "second.bias",
        "third.weight",
    ]


class Branching(Sorted):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.third(self.second(h if h.sum() > 0 else -h))


def test_networks_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert groups_of(registered(monkeypatch, Branching)) == ()
    said = capsys.readouterr().err
    assert "cannot be traced (symbolically traced variables cannot be used as inputs to control flow" in said
    assert "may declare permutation_groups()" in said

    class Declared(Branching):
        def permutation_groups(self) -> tuple[PermutationGroup, ...]:
            true = PermutationGroup(5, (Axis("second.weight", 0), Axis("second.bias", 0), Axis("third.weight", 1)))
            false = PermutationGroup(5, (Axis("second.weight", 0), Axis("third.weight", 1)))
            return true, false, PermutationGroup(7, (Axis("second.weight", 0),))

    (group,) = groups_of(registered(monkeypatch, Declared))
    assert len(group.axes) == 3
    said = capsys.readouterr().err
    assert "a group of 5 units of Own() changes its outputs by" in said and "second.weight[0], third.weight[1]" in said
    assert "a group of 7 units of Own() cannot be applied" in said


def test_groups_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    derive = symmetry.derive_groups
    monkeypatch.setattr(symmetry, "derive_groups", lambda *given: calls.append(1) or derive(*given))
    architecture = registered(monkeypatch, Gated)
    assert groups_of(architecture) is groups_of(Architecture("Own")) and len(calls) <= 1
