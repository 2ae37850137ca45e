"""Base networks, their symmetries, and what checkpoints output, against plain modules run one by one.

Legend: n checkpoints, Q queries, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from weightspace.config import ZooConfig
from weightspace.networks import behavior
from weightspace.networks.activations import ACTIVATIONS
from weightspace.networks.architectures import (
    INITS,
    NETWORKS,
    Architecture,
    initialize,
)
from weightspace.networks.behavior import Outputs, calibrate, logits, outputs, timings
from weightspace.networks.checkpoints import Checkpoints, concatenate, flatten, unflatten
from weightspace.networks.groups import PermutationGroup
from weightspace.networks.symmetry import align, groups_of, permute, random_permutations
from weightspace.runs import UserError
from weightspace.tasks.images import load_task
from weightspace.zoo.population import plan, train_population

Maker = Callable[..., Checkpoints]

ARCHITECTURES = [
    Architecture("CNN8"),
    Architecture("CNN8", {"channels": 3, "classes": 4, "activation": "tanh"}),
    Architecture("CNN3"),
    Architecture("CNN", {"activation": "silu"}),
    Architecture("LeNet5", {"dropout": 0.5}),
    Architecture("MLP", {"size": 4, "hidden": 6, "classes": 3, "activation": "gelu"}),
]


def by_hand(checkpoints: Checkpoints, inputs: Tensor, shared: bool = True) -> Tensor:
    """The independent route: every checkpoint as an ordinary module, one after another [n, Q, C]."""
    each = [inputs] * len(checkpoints) if shared else list(inputs)
    return torch.stack([checkpoints.network(row)(each[row]) for row in range(len(checkpoints))]).detach()


def images(architecture: Architecture, *batch: int, seed: int = 1) -> Tensor:
    shape = architecture.build().input_shape
    return torch.randn(*batch, *shape, generator=torch.Generator().manual_seed(seed))


# architectures


def test_parameter_counts() -> None:
    assert Architecture("CNN8").parameter_count == 2_758
    assert Architecture("CNN").parameter_count == 2_464
    assert Architecture("LeNet5").parameter_count == 62_006
    assert Architecture("CNN3").parameter_count == 10_853
    assert sum(math.prod(shape) for shape in Architecture("ResNet18").shapes.values()) == 11_173_962 + 2 * 4_800
    assert Architecture("MLP", {"size": 4, "hidden": 6, "classes": 3}).parameter_count == 16 * 6 + 6 + 42 + 18 + 3


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_is_complete(name: str) -> None:
    architecture = Architecture(name)
    network = architecture.build()
    assert not network.training
    assert network(torch.zeros(2, *network.input_shape)).shape == (2, 1 if name == "SIREN" else 10)
    state = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    assert architecture.shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert list(architecture.shapes) == list(state)
    assert Architecture(**architecture.to_json()) == architecture


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"SIREN"}))
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_activation_is_used(name: str, activation: str) -> None:
    torch.manual_seed(0)
    network = Architecture(name, {"activation": activation}).build()
    other = Architecture(name, {"activation": "gelu" if activation == "relu" else "relu"}).build()
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, *network.input_shape)
    assert not torch.allclose(network(x), other(x))


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown base network 'CNN9'; the base networks are CNN, CNN3, CNN8"):
        Architecture("CNN9").build()
    with pytest.raises(UserError, match=r"MLP takes no argument 'widht'; it takes channels, size, hidden"):
        Architecture("MLP", {"widht": 3}).build()
    with pytest.raises(UserError, match=r"unknown activation 'rleu'; the activations are .*relu"):
        Architecture("CNN8", {"activation": "rleu"}).build()
    with pytest.raises(UserError, match=r"unknown init 'xavier'; the inits are kaiming_normal, kaiming_uniform"):
        initialize(Architecture("CNN8"), "xavier", torch.Generator())


@pytest.mark.parametrize("init", sorted(INITS))
def test_inits_have_the_stated_distribution(init: str) -> None:
    """Moments and range, from the papers: kaiming std sqrt(2 / fan_in), uniform bound sqrt(3) std."""
    architecture = Architecture("CNN3")
    weights = initialize(architecture, init, torch.Generator().manual_seed(0))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == architecture.shapes
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert torch.equal(weight, torch.full_like(weight, 0.01))
            continue
        fan_in = math.prod(weight.shape[1:])
        gain = math.sqrt(2 / fan_in) if init.startswith("kaiming") else 1.0
        low, high, mean, std = {
            "uniform": (0.0, 1.0, 0.5, math.sqrt(1 / 12)),
            "normal": (-math.inf, math.inf, 0.0, 1.0),
            "kaiming_uniform": (-math.sqrt(3) * gain, math.sqrt(3) * gain, 0.0, gain),
            "kaiming_normal": (-math.inf, math.inf, 0.0, gain),
        }[init]
        error = 5 / math.sqrt(weight.numel())  # five standard errors
        assert low <= weight.min() and weight.max() <= high
        assert abs(weight.mean().item() - mean) < error * std
        assert abs(weight.std().item() / std - 1) < error
        if math.isinf(high):
            assert weight.abs().max() > (2 if weight.numel() > 200 else 1) * std  # tails
        else:
            assert weight.max() > mean + 0.95 * (high - mean)


def test_inits_draw_from_the_generator() -> None:
    def draw(seed: int) -> Tensor:
        return initialize(Architecture("CNN8"), "normal", torch.Generator().manual_seed(seed))["fc1.weight"]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# symmetries


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_permutations_keep_the_logits(architecture: Architecture, make_checkpoints: Maker) -> None:
    original = make_checkpoints(architecture, 3)
    groups = groups_of(architecture)
    hidden = [name for name in architecture.shapes if name.endswith("weight")][:-1]
    assert [group.size for group in groups] == [architecture.shapes[name][0] for name in hidden]
    generator = torch.Generator().manual_seed(3)
    permuted = permute(original.weights, groups, random_permutations(groups, 3, generator))
    moved = Checkpoints(architecture, permuted, original.frame)
    for name in hidden:
        assert not torch.equal(moved.weights[name], original.weights[name])
    x = images(architecture, 5)
    torch.testing.assert_close(by_hand(moved, x), by_hand(original, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_permutation_that_forgets_an_axis_changes_the_logits(
    architecture: Architecture, make_checkpoints: Maker
) -> None:
    original = make_checkpoints(architecture, 2)
    x = images(architecture, 5)
    expected = by_hand(original, x)
    for group in groups_of(architecture):
        for forgotten in group.axes:
            axes = tuple(axis for axis in group.axes if axis != forgotten)
            broken = [PermutationGroup(group.size, axes)]
            order = random_permutations(broken, 2, torch.Generator().manual_seed(3))
            moved = Checkpoints(architecture, permute(original.weights, broken, order), original.frame)
            assert (by_hand(moved, x) - expected).abs().max() > 1e-3, forgotten


def test_permute_follows_its_definition() -> None:
    """New unit i is old unit permutation[i]: rows, biases and the columns of the next layer, by plain indexing."""
    architecture = Architecture("MLP", {"size": 2, "hidden": 3, "classes": 2})
    weights = {name: torch.randn(2, *shape) for name, shape in architecture.shapes.items()}
    orders = torch.tensor([[2, 0, 1], [1, 0, 2]])
    permuted = permute(weights, groups_of(architecture)[:1], [orders])
    for b, order in enumerate(orders.tolist()):
        assert torch.equal(permuted["fc1.weight"][b], weights["fc1.weight"][b][order])
        assert torch.equal(permuted["fc1.bias"][b], weights["fc1.bias"][b][order])
        assert torch.equal(permuted["fc2.weight"][b], weights["fc2.weight"][b][:, order])
    for name in ("fc2.bias", "fc3.weight", "fc3.bias"):
        assert torch.equal(permuted[name], weights[name])


def test_random_permutations_are_permutations_and_uniform() -> None:
    group = PermutationGroup(3, ())
    (orders,) = random_permutations([group], 6000, torch.Generator().manual_seed(0))
    counts = pd.Series(map(tuple, orders.tolist())).value_counts()
    assert set(counts.index) == {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    assert (counts - 1000).abs().max() < 150  # five standard errors


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_align_recovers_a_known_permutation(architecture: Architecture, make_checkpoints: Maker) -> None:
    original = make_checkpoints(architecture, 3).weights
    groups = groups_of(architecture)
    moved = permute(original, groups, random_permutations(groups, 3, torch.Generator().manual_seed(4)))
    aligned = align(moved, original, groups)
    for name, weight in original.items():
        assert torch.equal(aligned[name], weight)


def test_align_to_one_common_reference_comes_closer_and_keeps_the_function(population: Checkpoints) -> None:
    groups = groups_of(population.architecture)
    reference = {name: weight[:1] for name, weight in population.weights.items()}
    aligned = align(population.weights, reference, groups)
    before = (flatten(population.weights) - flatten(reference)).norm(dim=1)
    after = (flatten(aligned) - flatten(reference)).norm(dim=1)
    assert after[0] == 0
    assert (after[1:] < before[1:]).all()
    x = images(population.architecture, 4)
    moved = dataclasses.replace(population, weights=aligned)
    torch.testing.assert_close(by_hand(moved, x), by_hand(population, x), rtol=1e-4, atol=1e-5)


def test_networks_are_equal_where_the_same_weights_behave_alike() -> None:
    plain = Architecture("CNN8", {"channels": 1, "classes": 10})
    for same in ({"activation": "relu", "channels": 1, "classes": 10}, {"dropout": 0.5}, {}):
        assert Architecture("CNN8", same) == plain and hash(Architecture("CNN8", same)) == hash(plain)
    for other in (Architecture("CNN8", {"activation": "tanh"}), Architecture("CNN8", {"classes": 9}), "CNN8"):
        assert other != plain
    assert Architecture("SIREN", {"omega": 30}) == Architecture("SIREN")
    stranger = Architecture("not.allowed:net", {"width": 4})
    assert stranger == Architecture("not.allowed:net", {"width": 4}) != Architecture("not.allowed:net")


def test_a_network_says_what_images_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.input_shape = (2,)

    monkeypatch.setitem(NETWORKS, "Plain", Plain)
    assert groups_of(Architecture("Plain")) == ()  # a single layer has no hidden units
    monkeypatch.setitem(NETWORKS, "Silent", lambda: nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Linear does not say what it takes; .* input_shape = \(channels"):
        groups_of(Architecture("Silent"))


# behavior


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_vectorized_equals_one_after_another_equals_modules(
    architecture: Architecture, shared: bool, make_checkpoints: Maker
) -> None:
    checkpoints = make_checkpoints(architecture, 5)
    x = images(architecture, 3) if shared else images(architecture, 5, 3)
    expected = by_hand(checkpoints, x, shared)
    network = architecture.build()  # its own weights play no part
    for group in (1, 2, 3, 5, 8):  # 2 and 3 do not divide 5, 8 exceeds it
        found = logits(network, checkpoints.weights, x, group, shared)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_agree(shared: bool, make_checkpoints: Maker) -> None:
    checkpoints = make_checkpoints(Architecture("CNN8"), 5)
    x = images(checkpoints.architecture, 3) if shared else images(checkpoints.architecture, 5, 3)
    slope = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(9))
    expected = []
    for row in range(5):
        network = checkpoints.network(row)
        (network(x if shared else x[row]) * slope[row]).sum().backward()
        expected.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for group in (1, 2, 5):
        weights = {name: weight.clone().requires_grad_() for name, weight in checkpoints.weights.items()}
        inputs = x.clone().requires_grad_()
        (logits(checkpoints.architecture.build(), weights, inputs, group, shared) * slope).sum().backward()
        assert inputs.grad is not None and inputs.grad.abs().max() > 0
        for name, weight in weights.items():
            stacked = torch.stack([gradient[name] for gradient in expected])  # type: ignore[misc]
            torch.testing.assert_close(weight.grad, stacked, rtol=1e-4, atol=1e-5)


def test_accuracy_and_loss_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 30, 3, generator=generator)
    labels = torch.randint(3, (30,), generator=generator)
    found = Outputs(values, labels)
    for row in range(4):
        assert found.accuracy[row].item() == pytest.approx(accuracy_score(labels, values[row].argmax(1)))
        probabilities = values[row].double().softmax(1)
        assert found.loss[row].item() == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
        assert found.loss[row].item() == pytest.approx(F.cross_entropy(values[row], labels).item(), rel=1e-5)
        np.testing.assert_allclose(found.probabilities[row], probabilities, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 7, 12, 32_768])
def test_outputs_in_chunks_equal_one_pass(
    at_once: int, population: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = images(population.architecture, 11), torch.arange(11) % 10
    expected = by_hand(population, x)
    seen = []

    def watched(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor, group: int) -> Tensor:
        seen.append(min(group, len(weights["fc2.bias"])) * len(inputs))
        return logits(network, weights, inputs, group)

    monkeypatch.setattr(behavior, "IMAGES_AT_ONCE", at_once)
    monkeypatch.setattr(behavior, "calibrate", lambda *_: 3)
    monkeypatch.setattr(behavior, "logits", watched)
    found = outputs(population, x, labels)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.labels is labels
    assert max(seen) <= max(at_once, 3)  # bounded memory: never more than this, but for one query of one group
    assert not found.logits.requires_grad


def test_outputs_with_real_calibration(population: Checkpoints) -> None:
    x = images(population.architecture, 4)
    torch.testing.assert_close(outputs(population, x).logits, by_hand(population, x), rtol=1e-4, atol=1e-5)


def test_calibration_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def timed(call: Callable[[], None]) -> float:
        calls.append(call)
        return float(
            1 + (len(calls) - 1) % 2
        )  # the sizes in turn: 1 s alone for four checkpoints, 2 s for a group of 8

    monkeypatch.setattr(behavior, "_timed", timed)
    threads = torch.get_num_threads()
    setting = (Architecture("MLP"), torch.device("cpu"), 16, 20)
    assert timings(*setting) == {1: 1 / 4, 8: 2 / 8}  # 32 is more than there are
    assert len(calls) == 2 * behavior.ROUNDS
    assert behavior.calibration_file() == tmp_path / "weightspace" / "calibration.json"
    assert behavior.calibration_file().exists()
    assert calibrate(*setting) in (1, 8)
    assert len(calls) == 2 * behavior.ROUNDS  # the second call reads the file
    assert calibrate(*setting[:3], 7) == 1  # fewer checkpoints: nothing new to measure
    assert len(calls) == 2 * behavior.ROUNDS
    for other in ({"training": True}, {"shared": False}, {"threads": threads + 1}):
        before = len(calls)
        timings(*setting, **other)  # type: ignore[arg-type]
        assert len(calls) > before, other
    assert torch.get_num_threads() == threads  # put back
    calls_now = len(calls)
    behavior.calibration_file().unlink()
    timings(*setting)
    assert len(calls) > calls_now  # safe to delete


def test_calibration_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behavior, "timings", lambda *_: {1: 0.3, 8: 0.1, 32: 0.2})
    assert calibrate(Architecture("MLP"), torch.device("cpu"), 16, 40) == 8


def test_calibration_runs_what_it_times() -> None:
    """The timed call really runs for every combination of its switches."""
    for shared in (True, False):
        for training in (True, False):
            for group in (1, 8):
                behavior._call(Architecture("MLP"), torch.device("cpu"), 2, group, shared, training)()


# the record


def test_checkpoints_refuse_weights_of_another_network(population: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"these weights are not of a MLP"):
        Checkpoints(Architecture("MLP"), population.weights, population.frame)
    with pytest.raises(UserError, match=r"conv1\.weight has shape \(8, 8, 1, 3, 3\), but 7 checkpoints"):
        Checkpoints(population.architecture, population.weights, population.frame.iloc[:7])
    wrong = {**population.weights, "fc2.bias": torch.zeros(8, 11)}
    with pytest.raises(UserError, match=r"fc2\.bias has shape \(8, 11\)"):
        Checkpoints(population.architecture, wrong, population.frame)
    backward = dict(reversed(population.weights.items()))
    with pytest.raises(UserError, match="these weights are not of a CNN8"):
        Checkpoints(population.architecture, backward, population.frame)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([5, 0, 5], [5, 0, 5]),
        (slice(2, 7, 2), [2, 4, 6]),
        (np.array([True, False] * 4), [0, 2, 4, 6]),
        (torch.tensor([7, -1]), [7, 7]),
        ([True] + [False] * 7, [0]),
    ],
)
def test_rows_select_weights_and_frame_alike(population: Checkpoints, rows: object, expected: list[int]) -> None:
    chosen = population.rows(rows)
    assert len(chosen) == len(expected)
    assert list(chosen.frame.index) == list(range(len(expected)))
    for name, weight in population.weights.items():
        assert torch.equal(chosen.weights[name], torch.stack([weight[row] for row in expected]))
    assert chosen.frame["val_acc"].tolist() == [population.frame["val_acc"][row] for row in expected]


def test_network_is_an_ordinary_and_independent_module(population: Checkpoints) -> None:
    network = population.network(3)
    assert isinstance(network, nn.Module) and not network.training
    before = population.weights["fc1.weight"].clone()
    for name, value in network.state_dict().items():
        assert torch.equal(value, population.weights[name][3])
        value.zero_()
    assert torch.equal(population.weights["fc1.weight"], before)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_flatten_and_unflatten_are_inverse(architecture: Architecture, make_checkpoints: Maker) -> None:
    checkpoints = make_checkpoints(architecture, 3)
    flat = flatten(checkpoints.weights)
    for row in range(3):  # torch's own order of parameters
        expected = nn.utils.parameters_to_vector(checkpoints.network(row).parameters())
        assert torch.equal(flat[row], expected)
    again = unflatten(architecture.shapes, flat)
    assert list(again) == list(checkpoints.weights)
    assert all(torch.equal(again[name], weight) for name, weight in checkpoints.weights.items())
    assert torch.equal(checkpoints.flat(), flat)


def test_concatenate_is_the_inverse_of_rows(population: Checkpoints) -> None:
    again = concatenate([population.rows(slice(0, 3)), population.rows(slice(3, 8))])
    assert torch.equal(again.flat(), population.flat())
    pd.testing.assert_frame_equal(again.frame, population.frame)


# networks of others


class Plain(nn.Module):
    """What the following vary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 6), nn.Linear(6, 10)
        self.register_buffer("seen", torch.zeros(6))
        self.input_shape = (1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.flatten(1))))


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        return self.last(hidden if hidden.sum() > 0 else -hidden)


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x[:, 0])[0][:, -1])


class Random(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x.flatten(1)), 0.5, training=self.training))


class StochasticDepth(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        return self.last(torch.relu(hidden) if not self.training or torch.rand(()) < 0.5 else hidden)


class Centering(Plain):
    """Keeps a mean of its inputs in training, beside its state_dict; in place, or as a new tensor."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        if self.training and self.in_place:
            self.mean.lerp_(hidden.detach().mean(0), 0.1)
        elif self.training:
            self.mean = self.mean.lerp(hidden.detach().mean(0), 0.1)
        return self.last(hidden - self.mean)


class CenteringAnew(Centering):
    in_place = False


class AlwaysRandom(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x.flatten(1)), 0.5))


class Counting(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.first(x.flatten(1)).mean(0)
        return super().forward(x)


class Leaving(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(x).detach().numpy())


class Partly(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).detach())


class Unfit(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Several(Plain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], Architecture]:
    def registered(kind: type[nn.Module]) -> Architecture:
        monkeypatch.setitem(NETWORKS, f"{kind.__name__}Net", kind)
        return Architecture(f"{kind.__name__}Net")

    return registered


@pytest.mark.parametrize(
    ("kind", "reason"), [(Branching, "data-dependent control flow"), (Recurrent, "Batching rule not implemented")]
)
def test_what_cannot_be_vectorized_runs_one_after_another(
    theirs: Callable[..., Architecture], kind: type[nn.Module], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = theirs(kind)
    assert not behavior.vectorized(architecture)
    assert f"run one after another, not vectorized ({reason}" in capsys.readouterr().err.replace(
        "vmap: It looks like you're attempting to use a Tensor in some ", ""
    )
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, *shape, generator=generator) for name, shape in architecture.shapes.items()}
    checkpoints = Checkpoints(architecture, weights, pd.DataFrame({"member": range(4)}))
    x = images(architecture, 5)
    torch.testing.assert_close(outputs(checkpoints, x).logits, by_hand(checkpoints, x))
    kept: list[Tensor] = []
    network = checkpoints.network(2)
    network.get_submodule("last").register_forward_hook(lambda module, given, output: kept.append(output.detach()))
    network(x)
    seen = behavior.activations(architecture.build(), weights, x, ["last"], together=False)
    torch.testing.assert_close(seen["last"][2], kept[0])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (StochasticDepth, "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow"),
        (Centering, "vmap: aten::lerp_"),
        (CenteringAnew, "in training it changes mean beside its state_dict, which checkpoints do not keep"),
    ],
)
def test_what_cannot_be_vectorized_in_training_trains_one_after_another(
    theirs: Callable[..., Architecture],
    kind: type[nn.Module],
    reason: str,
    tmp_path: Path,
    tiny_config: ZooConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = dataclasses.replace(
        tiny_config, tasks=("digits@1x4x4",), network=theirs(kind).name, epochs=1, save_epochs=(0, 1), group=None
    )
    zoo = train_population(config, tmp_path, 0, torch.device("cpu"))
    assert f"run one after another, not vectorized ({reason}" in capsys.readouterr().err
    frame = zoo.frame.sort_values("epoch")
    assert np.isfinite(frame["train_loss"]).all()
    before, after = (frame.loc[frame["epoch"] == epoch, "train_loss"].mean() for epoch in (0, 1))
    assert after < before


@pytest.mark.parametrize("kind", [Plain, Random])
def test_random_layers_of_training_are_vectorized(theirs: Callable[..., Architecture], kind: type[nn.Module]) -> None:
    assert behavior.vectorized(theirs(kind))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AlwaysRandom, "draws at random when it is called in evaluation mode"),
        (Counting, "changes seen when it is called in evaluation mode"),
        (Leaving, "no gradient reaches the weights of LeavingNet"),
        (Unfit, r"cannot be called with inputs \[3, 1, 4, 4\]: mat1 and mat2 shapes cannot be multiplied"),
        (Several, r"gives a tuple for inputs \[3, 1, 4, 4\], not a tensor \[3, classes\]"),
    ],
)
def test_what_cannot_be_run(theirs: Callable[..., Architecture], kind: type[nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        behavior.vectorized(theirs(kind))


def test_weights_that_are_not_trained(theirs: Callable[..., Architecture], capsys: pytest.CaptureFixture[str]) -> None:
    assert behavior.vectorized(theirs(Partly))
    assert "no gradient reaches first.weight, first.bias of PartlyNet(): they stay" in capsys.readouterr().err


def test_a_group_that_cannot_be(theirs: Callable[..., Architecture]) -> None:
    architecture = theirs(Branching)
    config = ZooConfig(tasks=("digits@1x4x4",), network=architecture.name, group=4)
    with pytest.raises(UserError, match=r"zoo.group=4: BranchingNet.* cannot be vectorized; leave it out"):
        plan(config, load_task("digits@1x4x4"), 8, 1)
