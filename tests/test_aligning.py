"""Aligned zoos: the functions stay, copies become equal, barriers are those of a loop over ordinary modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from weightspace.cli import main
from weightspace.networks.architectures import Architecture
from weightspace.networks.behavior import outputs
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.symmetry import align_features, features, groups_of, permute, random_permutations
from weightspace.runs import UserError
from weightspace.tasks.images import load_task
from weightspace.zoo.aligning import POINTS, align_zoo, barrier
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

CPU = torch.device("cpu")


def zoo_of(folder: Path, checkpoints: Checkpoints) -> ModelZoo:
    writer = ZooWriter(folder, checkpoints.architecture, {})
    writer.write(0, checkpoints)
    return writer.finish([0])


@pytest.fixture
def copies(tmp_path: Path, population: Checkpoints) -> ModelZoo:
    """Four members, two epochs: all the same network, its units in random order."""
    groups = groups_of(population.architecture)
    same = {name: weight[:1].expand(8, *weight.shape[1:]) for name, weight in population.weights.items()}
    moved = permute(same, groups, random_permutations(groups, 8, torch.Generator().manual_seed(0)))
    return zoo_of(tmp_path / "copies", Checkpoints(population.architecture, moved, population.frame))


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("to", ["mean", "2"])
def test_copies_become_equal(copies: ModelZoo, tmp_path: Path, to: str, by: str) -> None:
    found = align_zoo(copies, tmp_path / "aligned", to, 0, CPU, by)
    assert found["distance before"] > 1 and found["distance after"] < 1e-4
    assert found["largest barrier after"] < 1e-4 and found["pairs"] == 2
    aligned = ModelZoo.open(tmp_path / "aligned")
    assert aligned.frame.drop(columns="digest").equals(copies.frame.drop(columns="digest"))
    weights = aligned.read(aligned.frame).flat()
    torch.testing.assert_close(weights, weights[:1].expand_as(weights))
    images = load_task("digits").test.images[:16]
    before, after = (outputs(zoo.read(zoo.frame), images).logits for zoo in (copies, aligned))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert align_zoo(copies, tmp_path / "aligned", to, 0, CPU, by) == found  # already done


RESIDUAL = [
    Architecture("ResNet18", {"channels": 1, "size": 8, "width": 4}),
    Architecture("ViT", {"channels": 1, "size": 8, "width": 8, "depth": 1, "heads": 2}),
]


@pytest.mark.parametrize("architecture", RESIDUAL, ids=lambda each: each.name)
def test_residual_streams_and_heads_by_activations(
    architecture: Architecture, make_checkpoints: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    """Copies of one network, nearly: heads of attention, which no layer shows, follow by their weights."""
    one, groups = make_checkpoints(architecture, 6), groups_of(architecture)
    same = {name: weight[:1].expand(6, *weight.shape[1:]) * (1 + 1e-3) for name, weight in one.weights.items()}
    moved = permute(same, groups, random_permutations(groups, 6, torch.Generator().manual_seed(0)))
    zoo = zoo_of(tmp_path / "copies", Checkpoints(architecture, moved, one.frame))
    found = align_zoo(zoo, tmp_path / "aligned", "1", 0, CPU, "activations")
    assert found["distance before"] > 1 and found["distance after"] < 1e-3


def test_units_by_hand(population: Checkpoints) -> None:
    """What a unit puts out is what a hook on an ordinary module sees; matching pairs the most alike units."""
    groups, images = groups_of(population.architecture), load_task("digits").val.images[:6]
    found = features(population.architecture, population.weights, images, groups)
    kept = {}
    network = population.network(3)
    network.get_submodule("conv2").register_forward_hook(lambda m, i, output: kept.update(conv2=output.detach()))
    network(images)
    channels = kept["conv2"].transpose(0, 1).flatten(1)  # [16, 6 * 4 * 4]
    conv2 = next(i for i, group in enumerate(groups) if group.size == 16)
    torch.testing.assert_close(found[conv2][3], channels - channels.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    own, reference = found[conv2][3:4], found[conv2][:1]
    (order,) = align_features([own], [reference])
    score = own[0].double() @ reference[0].T.double()
    best = max(sum(score[p, i] for i, p in enumerate(some)) for some in (torch.randperm(16) for _ in range(2000)))
    assert sum(score[p, i] for i, p in enumerate(order[0])) >= best


def test_barriers_by_hand(population: Checkpoints) -> None:
    first, second = population.rows([0, 1]).weights, population.rows([2, 3]).weights
    images = load_task("digits").val
    expected = []
    for row in range(2):
        losses = []
        for step in range(POINTS):
            s = step / (POINTS - 1)
            mixed = {name: (1 - s) * first[name][row] + s * second[name][row] for name in first}
            network = population.architecture.build()
            network.load_state_dict(mixed)
            losses.append(F.cross_entropy(network(images.images), images.labels).item())
        above = [loss - (losses[0] + (losses[-1] - losses[0]) * i / (POINTS - 1)) for i, loss in enumerate(losses)]
        expected.append(max(above))
    found = barrier(population.architecture, first, second, images)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_aligned(copies: ModelZoo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="aligned by weights or activations, not by 'taste'"):
        align_zoo(copies, tmp_path / "aligned", "mean", 0, CPU, "taste")
    with pytest.raises(UserError, match="there is no member '77'; align to 'mean' or to a member's number"):
        align_zoo(copies, tmp_path / "aligned", "77", 0, CPU)
    assert not (tmp_path / "aligned").exists()
    architecture = Architecture("MLP", {"size": 8, "hidden": 1})
    frame = pd.DataFrame({"member": [0], "epoch": [0], "split": ["train"], "task": ["digits"]})
    weights = {name: torch.zeros(1, *shape) for name, shape in architecture.shapes.items()}
    plain = zoo_of(tmp_path / "plain", Checkpoints(architecture, weights, frame))
    with pytest.raises(UserError, match=r"has no units that can be reordered, so there is nothing to align"):
        align_zoo(plain, tmp_path / "aligned", "mean", 0, CPU)


def test_the_command(copies: ModelZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["zoo", "align", str(copies.folder), "--out", str(tmp_path / "aligned")])
    said = capsys.readouterr().out
    assert "mean barrier" in said and "-> 0.0000" in said and "over 2 pairs of members" in said
