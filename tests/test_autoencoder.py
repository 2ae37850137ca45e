"""The autoencoder: attention stays within a checkpoint, and training begins at the principal components.

Legend: B checkpoints, T tokens, D token size, Z latent values per token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from weightspace.config import AutoencoderConfig
from weightspace.hyperrep.autoencoder import Autoencoder, _shares
from weightspace.networks.architectures import Architecture
from weightspace.runs import UserError
from weightspace.tokens.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Architecture("MLP", {"size": 2, "hidden": 3, "classes": 2}))  # T = 8, D = 5


def build(latent: int = 2, components: int = 1) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        width=16, layers=2, heads=2, feedforward=24, latent=latent, head=6, components=components
    )
    return Autoencoder(config, TOKENIZER.mask, TOKENIZER.positions).eval()


def tokens(count: int, seed: int = 0) -> Tensor:
    """Correlated tokens with another scale at every entry, zero at padding [n, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    size = TOKENIZER.token_size
    mixing = torch.randn(TOKENIZER.count, size, size, generator=torch.Generator().manual_seed(99))
    x = torch.einsum("btd,tde->bte", torch.randn(count, TOKENIZER.count, size, generator=generator), mixing)
    return (x + 2) * TOKENIZER.mask


@torch.no_grad()
def perturb(autoencoder: Autoencoder) -> Autoencoder:
    """Move every parameter, as training would: outputs that start at zero take part."""
    for parameter in autoencoder.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return autoencoder


@pytest.fixture(params=[("fresh", 1), ("fitted, then moved", 1), ("fitted, then moved", 3)])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    state, components = request.param
    fresh = build(components=components)
    if state != "fresh":
        fresh.fit(tokens(40), 0)
        perturb(fresh)
    return fresh


def test_shapes(autoencoder: Autoencoder) -> None:
    z = autoencoder.encode(tokens(3))
    assert z.shape == (3, 8, 2)
    assert autoencoder.decode(z).shape == (3, 8, 5)
    assert autoencoder.project(z).shape == (3, 6)


def test_embedding_does_not_depend_on_the_rest_of_the_batch(autoencoder: Autoencoder) -> None:
    x = tokens(4)
    together = autoencoder.encode(x)
    for row in range(4):
        torch.testing.assert_close(autoencoder.encode(x[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)
    loud = x.clone()
    loud[1:] = 100 * tokens(3, seed=1)
    torch.testing.assert_close(autoencoder.encode(loud)[0], together[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(autoencoder.encode(loud)[1], together[1])


def test_decoding_does_not_depend_on_the_rest_of_the_batch(autoencoder: Autoencoder) -> None:
    z = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    together = autoencoder.decode(z)
    for row in range(4):
        torch.testing.assert_close(autoencoder.decode(z[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)


def test_every_token_depends_on_every_token_of_its_checkpoint(autoencoder: Autoencoder) -> None:
    x = tokens(1)
    z = autoencoder.encode(x)
    decoded = autoencoder.decode(z)
    for token in range(8):
        other = x.clone()
        other[0, token, 0] += 1
        assert ((autoencoder.encode(other) - z).abs().amax(-1) > 1e-6).all(), token
        moved = z.detach().clone()
        moved[0, token, 0] += 1
        assert ((autoencoder.decode(moved) - decoded).abs().amax(-1) > 1e-6).all(), token


def test_right_after_fit_tokens_stand_alone() -> None:
    """The violation of the property above: the transformer's contribution starts at zero."""
    autoencoder = build()
    autoencoder.fit(tokens(40), 0)
    x = tokens(1)
    other = x.clone()
    other[0, 0, 0] += 1
    changed = (autoencoder.encode(other) - autoencoder.encode(x)).abs().amax(-1)[0]
    assert changed[0] > 1e-4 and (changed[1:] == 0).all()


def test_positions_matter() -> None:
    x = tokens(1)
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    autoencoder = build()
    assert not torch.allclose(autoencoder.encode(swapped)[0, 0], autoencoder.encode(x)[0, 1])


def test_training_and_evaluation_mode_agree(autoencoder: Autoencoder) -> None:
    x = tokens(3)
    with torch.no_grad():
        z = autoencoder.eval().encode(x)
        x_hat, features = autoencoder.decode(z), autoencoder.project(z)
        autoencoder.train()
        torch.testing.assert_close(autoencoder.encode(x), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(autoencoder.decode(z), x_hat, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(autoencoder.project(z), features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("latent", [5, 9])
def test_enough_latent_values_reconstruct_exactly(latent: int) -> None:
    autoencoder = build(latent)
    autoencoder.fit(tokens(40), 0)
    for x in (tokens(40), tokens(7, seed=1)):  # what it was fitted on, and what it never saw
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("latent", [1, 2, 3])
def test_fewer_latent_values_are_the_principal_components(latent: int) -> None:
    autoencoder = build(latent)
    fitted, fresh = tokens(60), tokens(20, seed=1)
    autoencoder.fit(fitted, 0)
    for x in (fitted, fresh):
        z = autoencoder.encode(x)
        x_hat = autoencoder.decode(z)
        for position in range(TOKENIZER.count):
            pca = PCA(latent).fit(fitted[:, position].double().numpy())
            values = pca.transform(x[:, position].double().numpy())
            expected = pca.inverse_transform(values) * TOKENIZER.mask[position].numpy()
            np.testing.assert_allclose(x_hat[:, position], expected, atol=1e-3)
            np.testing.assert_allclose(z[:, position].abs(), np.abs(values), atol=1e-3)  # signs are free
    assert (autoencoder.decode(autoencoder.encode(fitted)) - fitted).square().mean() > 1e-3  # it is a compression


def test_output_is_zero_at_padding(autoencoder: Autoencoder) -> None:
    assert not TOKENIZER.mask.all()
    x_hat = autoencoder.decode(torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0)))
    assert (x_hat[:, ~TOKENIZER.mask] == 0).all()
    assert (x_hat[:, TOKENIZER.mask] != 0).all()


def test_every_parameter_is_trained(autoencoder: Autoencoder) -> None:
    x = tokens(4)
    autoencoder.train()
    z = autoencoder.encode(x)
    ((autoencoder.decode(z) - x).square().mean() + autoencoder.project(z).square().mean()).backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_mixture_is_the_principal_components_around_each_cluster() -> None:
    """Three groups of siblings: their common part costs nothing, the latent values go to what differs within."""
    size = TOKENIZER.token_size
    centers = 20 * torch.randn(3, TOKENIZER.count, size, generator=torch.Generator().manual_seed(5)) * TOKENIZER.mask
    group = torch.arange(90) % 3
    x = centers[group] + tokens(90)
    autoencoder = build(latent=2, components=3)
    autoencoder.fit(x, 0)
    x_hat = autoencoder.decode(autoencoder.encode(x))
    means = torch.stack([x[group == number].mean(0) for number in range(3)])
    residual = x - means[group]
    for position in range(TOKENIZER.count):
        pca = PCA(2).fit(residual[:, position].double().numpy())
        around = pca.inverse_transform(pca.transform(residual[:, position].double().numpy()))
        expected = means[group][:, position].numpy() + around
        expected = expected * TOKENIZER.mask[position].numpy()
        np.testing.assert_allclose(x_hat[:, position].numpy(), expected, atol=2e-3)
    alone = build(latent=2, components=1)
    alone.fit(x, 0)
    error = (x_hat - x).square().mean()
    assert error < 0.5 * (alone.decode(alone.encode(x)) - x).square().mean()


def test_more_components_than_checkpoints_are_refused() -> None:
    with pytest.raises(UserError, match="components=5 exceeds the 4 training checkpoints"):
        build(components=5).fit(tokens(4), 0)


@torch.no_grad()
def test_the_decoder_knows_the_component_that_the_encoder_chose() -> None:
    """Clusters that one direction per token hardly tells apart: unscaled, codes would be mistaken for each other."""
    generator = torch.Generator().manual_seed(5)
    autoencoder = build(latent=1, components=3)
    places = torch.randn(3, 8, 5, generator=generator) * TOKENIZER.mask
    which = torch.arange(60) % 3
    within = torch.randn(60, 8, 1, generator=generator) * torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])
    x = (places[which] + within) * TOKENIZER.mask
    autoencoder.fit(x, 0)
    mixture = autoencoder.mixture
    assert mixture is not None and len(mixture.centers) == 4
    z = mixture.encode(x, slice(None)).flatten(1)
    encoder = _shares(x, mixture.centers, mixture.spread[0]).argmax(1)
    codes = mixture.codes.flatten(1)
    assert torch.equal(encoder, torch.cdist(z, codes).argmin(1))
    plain = (mixture.centers - x.mean(0)) * 1.0
    smaller = torch.einsum("ktd,tdr->ktr", plain, mixture.encoder[0]).flatten(1)
    assert not torch.equal(encoder, torch.cdist(z - codes[encoder] + smaller[encoder], smaller).argmin(1))
