"""Weights as sequences: exact inverses, normalization, views, and which rows a step sees.

Legend: n checkpoints, T tokens, D token size, P weights of one checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightspace.networks.architectures import NETWORKS, Architecture
from weightspace.networks.behavior import logits
from weightspace.networks.checkpoints import Checkpoints, flatten
from weightspace.networks.symmetry import groups_of
from weightspace.runs import UserError
from weightspace.tokens.normalize import NORMALIZERS, none, standardize
from weightspace.tokens.stream import batch_rows
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.tokens.views import erased, noisy, permuted

Maker = Callable[..., Checkpoints]

SMALL = Architecture("MLP", {"size": 2, "hidden": 3, "classes": 2})


RESIDUAL = ("MLPMixer", "ResNet18", "ViT")


def architectures(names: set[str] | None = None) -> st.SearchStrategy[Architecture]:
    """Shipped base networks (default: every one), with arguments that change their shapes."""
    channels, classes = st.integers(1, 3), st.integers(2, 11)
    convolutional = st.builds(
        lambda name, channels, classes: Architecture(
            name,
            {"channels": channels, "classes": classes} | ({"size": 8, "width": 4} if name in RESIDUAL else {}),
        ),
        st.sampled_from(sorted((names or set(NETWORKS)) - {"MLP", "SIREN"})),
        channels,
        classes,
    )
    dense = st.builds(
        lambda channels, size, hidden, classes: Architecture(
            "MLP", {"channels": channels, "size": size, "hidden": hidden, "classes": classes}
        ),
        channels,
        st.integers(1, 5),
        st.integers(1, 9),
        classes,
    )
    sines = st.builds(
        lambda width, outputs: Architecture("SIREN", {"width": width, "outputs": outputs}), classes, channels
    )
    return dense | convolutional | (sines if names is None else st.nothing())


def weights_of(architecture: Architecture, count: int, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(count, *shape, generator=generator) for name, shape in architecture.shapes.items()
    }


# tokenizer


@settings(deadline=None, max_examples=40)
@given(
    architecture=architectures(),
    token_size=st.none() | st.integers(1, 70),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-42, 1e30, -0.0]),
)
def test_round_trip_is_bit_exact(
    architecture: Architecture, token_size: int | None, count: int, seed: int, scale: float
) -> None:
    weights = weights_of(architecture, count, seed, scale)
    tokenizer = Tokenizer(architecture, token_size)
    tokens = tokenizer.tokenize(weights)
    assert tokens.x.shape == (count, tokenizer.count, tokenizer.token_size)
    assert tokens.mask.shape == tokens.x.shape[1:] and tokens.mask.dtype == torch.bool
    assert int(tokens.mask.sum()) == architecture.parameter_count
    assert (tokens.x[:, ~tokens.mask] == 0).all()
    again = tokenizer.detokenize(tokens.x)
    assert list(again) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(again[name].contiguous().view(torch.int32), weight.view(torch.int32)), name
    noise = torch.randn(tokens.x.shape) * ~tokens.mask
    assert torch.equal(flatten(tokenizer.detokenize(tokens.x + noise)), flatten(weights))  # padding is ignored


@settings(deadline=None, max_examples=30)
@given(architecture=architectures(set(NETWORKS) - {*RESIDUAL}), token_size=st.none() | st.integers(1, 70))
def test_rows_and_positions_are_as_defined(architecture: Architecture, token_size: int | None) -> None:
    """Walk the modules in order; their rows [weight[u].flatten(), bias[u]] are the runs of tokens of (layer, unit)."""
    weights = weights_of(architecture, 1, 0)
    tokenizer = Tokenizer(architecture, token_size)
    tokens = tokenizer.tokenize(weights)
    layers = [name for name, module in architecture.build().named_children() if list(module.parameters())]
    rows = [
        torch.cat([weights[f"{layer}.weight"][0, unit].flatten(), weights[f"{layer}.bias"][0, unit : unit + 1]])
        for layer in layers
        for unit in range(architecture.shapes[f"{layer}.bias"][0])
    ]
    units = [(number, unit) for number, name in enumerate(layers) for unit in range(len(weights[f"{name}.bias"][0]))]
    size = token_size or max(len(row) for row in rows)
    assert tokenizer.layers == layers
    assert tokenizer.token_size == size
    start = 0
    for row, unit in zip(rows, units, strict=True):
        end = start - (-len(row) // size)
        mine = tokens.x[0, start:end].flatten()
        assert torch.equal(mine[: len(row)], row)
        assert (mine[len(row) :] == 0).all()
        real = tokens.mask[start:end].flatten()
        assert real[: len(row)].all() and not real[len(row) :].any()
        assert tokens.positions[start:end].tolist() == [[index, *unit] for index in range(start, end)]
        start = end
    assert start == tokenizer.count == len(tokens.positions)


def test_default_token_is_the_longest_row() -> None:
    assert Tokenizer(Architecture("CNN8")).token_size == 8 * 9 + 1  # a unit of conv2
    assert Tokenizer(Architecture("CNN8")).count == 8 + 16 + 20 + 10
    assert Tokenizer(Architecture("CNN3")).token_size == 32 * 9 + 1  # a unit of conv3


def test_a_layer_of_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Upward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 3)
            self.rise = nn.ConvTranspose2d(1, 2, 3)

    monkeypatch.setitem(NETWORKS, "Upward", Upward)
    with pytest.raises(
        UserError, match=r"layer 'rise' is a ConvTranspose2d, .*register_layer\(torch.nn.ConvTranspose2d, 'w"
    ):
        Tokenizer(Architecture("Upward"))


def test_layers_without_bias_and_nested_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv1d(2, 3, 2, bias=False), nn.ReLU(), nn.Linear(4, 2))

    monkeypatch.setitem(NETWORKS, "Nested", Nested)
    architecture = Architecture("Nested")
    weights = weights_of(architecture, 2, 0)
    tokenizer = Tokenizer(architecture)
    assert tokenizer.layers == ["body.0", "body.2"]
    assert tokenizer.mask.sum(1).tolist() == [4, 4, 4, 5, 5]
    again = tokenizer.detokenize(tokenizer.tokenize(weights).x)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "token_size",
    [-1, -73, 0],
)
def test_token_size_must_be_positive(token_size: int) -> None:
    with pytest.raises(UserError, match=f"token_size must be at least 1, given {token_size}"):
        Tokenizer(SMALL, token_size)


# normalization


def uneven(architecture: Architecture, count: int) -> dict[str, Tensor]:
    """Weights whose layers differ in mean and spread."""
    weights = weights_of(architecture, count, 0)
    return {name: (number + 1) * weight + number for number, (name, weight) in enumerate(weights.items())}


@pytest.mark.parametrize("token_size", [None, 2])
def test_standardize_gives_each_layer_mean_0_and_std_1(token_size: int | None) -> None:
    tokenizer = Tokenizer(SMALL, token_size)
    weights = uneven(SMALL, 50)
    x = tokenizer.tokenize(weights).x
    normalizer = standardize(tokenizer, x)
    normalized = normalizer.normalize(x)
    found = tokenizer.detokenize(normalized)
    for layer in tokenizer.layers:
        values = np.concatenate([found[f"{layer}.{kind}"].flatten().double().numpy() for kind in ("weight", "bias")])
        assert values.mean() == pytest.approx(0, abs=1e-5)
        assert values.std() == pytest.approx(1, abs=1e-5)
    assert (normalized[:, ~tokenizer.mask] == 0).all()
    torch.testing.assert_close(normalizer.denormalize(normalized), x, rtol=1e-4, atol=1e-4)


def test_denormalize_keeps_padding_zero() -> None:
    tokenizer = Tokenizer(SMALL)
    normalizer = standardize(tokenizer, tokenizer.tokenize(uneven(SMALL, 5)).x)
    anything = torch.randn(2, tokenizer.count, tokenizer.token_size)
    assert (normalizer.denormalize(anything)[:, ~tokenizer.mask] == 0).all()
    torch.testing.assert_close(
        normalizer.normalize(normalizer.denormalize(anything)), anything * tokenizer.mask, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["min-max", "l2"])
def test_min_max_and_l2_scale_each_layer(name: str) -> None:
    tokenizer = Tokenizer(SMALL)
    x = tokenizer.tokenize(uneven(SMALL, 5)).x
    normalizer = NORMALIZERS[name](tokenizer, x)
    scaled = normalizer.normalize(x)
    torch.testing.assert_close(normalizer.denormalize(scaled), x)
    for layer in range(len(tokenizer.layers)):
        rows = tokenizer.positions[:, 1] == layer
        values = scaled[:, rows][:, tokenizer.mask[rows]]
        if name == "l2":
            assert values.norm(dim=1).mean().item() == pytest.approx(1, rel=1e-5)
        else:
            assert (values.min().item(), values.max().item()) == pytest.approx((-1, 1), abs=1e-5)


def test_standardize_is_fitted_once() -> None:
    """Other checkpoints are measured by the training checkpoints' mean and spread, not by their own."""
    tokenizer = Tokenizer(SMALL)
    weights = uneven(SMALL, 50)
    normalizer = standardize(tokenizer, tokenizer.tokenize(weights).x)
    shifted = tokenizer.tokenize({name: weight + 1 for name, weight in weights.items()}).x
    assert normalizer.normalize(shifted)[:, tokenizer.mask].mean() > 0.1


def test_a_constant_layer_stays_finite() -> None:
    tokenizer = Tokenizer(SMALL)
    weights = {name: torch.full_like(weight, 0.5) for name, weight in weights_of(SMALL, 3, 0).items()}
    x = tokenizer.tokenize(weights).x
    normalizer = standardize(tokenizer, x)
    assert (normalizer.normalize(x) == 0).all()
    assert torch.equal(normalizer.denormalize(normalizer.normalize(x)), x)


def test_none_leaves_raw_weights() -> None:
    tokenizer = Tokenizer(SMALL)
    x = tokenizer.tokenize(uneven(SMALL, 3)).x
    assert torch.equal(none(tokenizer, x).normalize(x), x)
    assert torch.equal(none(tokenizer, x).denormalize(x), x)


# views


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_permuted_keeps_the_logits_and_moves_the_weights(name: str, make_checkpoints: Maker) -> None:
    checkpoints = make_checkpoints(Architecture(name, {"width": 8} if name in RESIDUAL else {}), 3)
    network = checkpoints.architecture.build()
    groups = groups_of(checkpoints.architecture)
    generator = torch.Generator().manual_seed(1)
    views = [permuted(checkpoints.weights, groups, generator) for _ in range(2)]
    x = torch.randn(4, *network.input_shape, generator=generator)
    expected = logits(network, checkpoints.weights, x, 1)
    for view in views:
        torch.testing.assert_close(logits(network, view, x, 1), expected, rtol=1e-4, atol=1e-5)
        assert ((flatten(view) != flatten(checkpoints.weights)).float().mean(1) > 0.5).all()
        torch.testing.assert_close(flatten(view).sort(1).values, flatten(checkpoints.weights).sort(1).values)
    assert not torch.equal(flatten(views[0]), flatten(views[1]))  # fresh at every call


def test_permuted_draws_another_order_for_every_checkpoint() -> None:
    weights = weights_of(Architecture("CNN8"), 1, 0)
    same = {name: weight.expand(3, *weight.shape[1:]) for name, weight in weights.items()}
    view = flatten(permuted(same, groups_of(Architecture("CNN8")), torch.Generator().manual_seed(1)))
    assert not torch.equal(view[0], view[1]) and not torch.equal(view[1], view[2])


def test_noise_has_its_scale_and_leaves_padding() -> None:
    tokenizer = Tokenizer(SMALL)
    x = tokenizer.tokenize(weights_of(SMALL, 400, 0)).x
    noised = noisy(x, tokenizer.mask, 0.3, torch.Generator().manual_seed(1))
    assert (noised[:, ~tokenizer.mask] == 0).all()
    difference = (noised - x)[:, tokenizer.mask]
    assert difference.std().item() == pytest.approx(0.3, rel=0.03)
    assert difference.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(noisy(x, tokenizer.mask, 0.0, torch.Generator()), x)


def test_erased_takes_whole_tokens() -> None:
    x = torch.rand(200, 6, 4) + 1
    gone = (erased(x, 0.25, torch.Generator().manual_seed(1)) == 0).float().mean(2)
    assert set(gone.flatten().tolist()) == {0.0, 1.0}
    assert gone.mean().item() == pytest.approx(0.25, abs=0.06)  # five standard errors
    assert torch.equal(erased(x, 0.0, torch.Generator()), x)
    assert (erased(x, 1.0, torch.Generator()) == 0).all()


# which rows a step sees


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_pass_visits_every_row_once(count: int, batch_size: int, seed: int) -> None:
    passes = 3
    steps = -(-passes * count // batch_size)
    batches = [batch_rows(count, batch_size, step, seed) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    rows = torch.cat(batches)[: passes * count].view(passes, count)
    assert torch.equal(rows.sort(1).values, torch.arange(count).expand(passes, -1))
    for step in reversed(range(steps)):  # a pure function of the step: asked again, in another order
        assert torch.equal(batch_rows(count, batch_size, step, seed), batches[step])


def test_passes_and_seeds_are_shuffled_afresh() -> None:
    first, second, other = batch_rows(50, 50, 0, 0), batch_rows(50, 50, 1, 0), batch_rows(50, 50, 0, 1)
    assert not torch.equal(first, torch.arange(50))
    assert not torch.equal(first, second) and not torch.equal(first, other)
