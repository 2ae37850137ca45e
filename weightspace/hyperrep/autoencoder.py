"""The autoencoder: tokens of one checkpoint -> embedding -> tokens, with attention over the tokens of one checkpoint.

Legend: n, B checkpoints, T tokens, D token size, M model width, Z latent values per token, K components.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from weightspace.config import AutoencoderConfig
from weightspace.runs import UserError


class Positions(nn.Module):
    """Learned vectors for the three positions of a token, summed."""

    positions: Tensor
    """[T, 3]"""

    def __init__(self, positions: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("positions", positions, persistent=False)
        tables = [nn.Embedding(int(column.max()) + 1, width) for column in positions.T]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.tables = nn.ModuleList(tables)

    def forward(self) -> Tensor:
        return torch.stack(
            [table(column) for table, column in zip(self.tables, self.positions.unbind(1), strict=True)]
        ).sum(0)


class LinearMixture(nn.Module):
    """K linear autoencoders per token position, chosen by the whole checkpoint: a mixture of principal components.

    Component k has a center c_k in token space, its code e_k in latent space, and a basis per position. How much of
    each component a checkpoint gets follows from its distances to the centers (encoder) or the codes (decoder), as in
    a mixture of probabilistic PCA (Tipping and Bishop 1999, "Mixtures of probabilistic principal component
    analyzers"). Members that start from the same weights lie around one center, so that the latent values are spent on
    what training changed. With one component it is PCA per position.
    """

    spread: Tensor
    """[2]: variance per entry around the centers and around the codes."""

    def __init__(self, components: int, tokens: int, size: int, latent: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(components, tokens, size))
        self.codes = nn.Parameter(torch.zeros(components, tokens, latent))
        self.encoder = nn.Parameter(torch.zeros(components, tokens, size, latent))
        self.decoder = nn.Parameter(torch.zeros(components, tokens, latent, size))
        self.register_buffer("spread", torch.ones(2))

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, Z]."""
        return _mapped(x, self.centers, self.codes, self.encoder, self.spread[0])

    def decode(self, z: Tensor) -> Tensor:
        """[B, T, Z] -> [B, T, D]."""
        return _mapped(z, self.codes, self.centers, self.decoder, self.spread[1])

    @torch.no_grad()
    def fit(self, x: Tensor, mask: Tensor, seed: int) -> None:
        """Start from the k-means clusters of training tokens [n, T, D] and the principal components around them.

        Raises:
            UserError: fewer checkpoints than components.
        """
        components, latent = len(self.centers), self.codes.shape[-1]
        if len(x) < components:
            raise UserError(f"autoencoder.components={components} exceeds the {len(x)} training checkpoints; lower it")
        with threadpool_limits(1):  # threads add up the centers in an order that changes from run to run
            clusters: Any = KMeans(components, random_state=seed % 2**32).fit(x.flatten(1).numpy())
        centers = torch.from_numpy(clusters.cluster_centers_).view(components, *x.shape[1:]).to(x)
        residual = x - centers[torch.from_numpy(clusters.labels_).long()]  # [n, T, D]
        basis = principal_directions(residual, latent)  # [T, D, Z]
        overall = principal_directions(x - x.mean(0), latent)
        self.centers.copy_(centers)
        self.codes.copy_(torch.einsum("ktd,tdz->ktz", centers - x.mean(0), overall))
        self.encoder.copy_(basis.expand_as(self.encoder))
        self.decoder.copy_(basis.transpose(1, 2).expand_as(self.decoder))
        smallest = 1e-6  # of a variance; keeps the distances finite where checkpoints coincide with their centers
        self.spread[0] = (residual.square().sum() / (len(x) * mask.sum())).clamp(min=smallest)
        self.spread[1] = torch.einsum("ntd,tdz->ntz", residual, basis).square().mean().clamp(min=smallest)


def _mapped(x: Tensor, origin: Tensor, target: Tensor, basis: Tensor, spread: Tensor) -> Tensor:
    """sum_k r_k (target_k + (x - origin_k) basis_k) with the responsibilities r of x: [B, T, I] -> [B, T, O].

    All components are mapped in one batched product over the positions: that is cheaper than to gather bases.

    Args:
        x: [B, T, I].
        origin: [K, T, I].
        target: [K, T, O].
        basis: [K, T, I, O].
        spread: variance per entry around the origins.
    """
    flat, origins = x.flatten(1), origin.flatten(1)
    distance = flat.square().sum(1, keepdim=True) + origins.square().sum(1) - 2 * flat @ origins.T  # [B, K]
    share = (-0.5 * distance / spread).softmax(1)  # [B, K]
    offset = target - torch.einsum("kti,ktio->kto", origin, basis)  # [K, T, O]
    every = x.transpose(0, 1) @ basis.permute(1, 2, 0, 3).flatten(2)  # [T, B, K * O]
    mapped = torch.einsum("bk,tbko->bto", share, every.unflatten(2, (len(basis), -1)))
    return mapped + torch.einsum("bk,kto->bto", share, offset)


def principal_directions(centered: Tensor, count: int) -> Tensor:
    """The first `count` principal directions per position of centered tokens [n, T, D] -> [T, D, count].

    Zero-padded where there are fewer entries than directions.
    """
    rows = centered.transpose(0, 1).double()  # [T, n, D]
    vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors.flip(-1)[..., :count]  # largest first
    return F.pad(vectors, (0, max(count - vectors.shape[-1], 0))).to(centered)


def transformer(width: int, layers: int, heads: int, feedforward: int) -> nn.TransformerEncoder:
    """Pre-norm transformer blocks over [B, T, M], without dropout."""
    block = nn.TransformerEncoderLayer(
        width, heads, feedforward, dropout=0.0, activation=F.relu, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)


class Autoencoder(nn.Module):
    """Encoder, decoder and projection head.

    Beside the transformer runs a mixture of linear autoencoders. It starts as the principal components of the training
    tokens (`fit`) while the transformer's contribution starts at zero, so training begins at the best linear
    compression and spends its steps on what linear maps cannot do. With config.components = 0 it is the transformer
    alone.
    """

    mask: Tensor
    """[T, D]"""

    def __init__(self, config: AutoencoderConfig, mask: Tensor, positions: Tensor) -> None:
        """Build the autoencoder for tokens with this mask [T, D] and these positions [T, 3]."""
        super().__init__()
        tokens, size = mask.shape
        width, latent = config.width, config.latent
        self.register_buffer("mask", mask, persistent=False)
        self.embed = nn.Linear(size, width)
        self.encoder_positions = Positions(positions, width)
        self.encoder = transformer(width, config.layers, config.heads, config.feedforward)
        self.to_latent = nn.Linear(width, latent)
        self.from_latent = nn.Linear(latent, width)
        self.decoder_positions = Positions(positions, width)
        self.decoder = transformer(width, config.layers, config.heads, config.feedforward)
        self.to_token = nn.Linear(width, size)
        self.mixture = LinearMixture(config.components, tokens, size, latent) if config.components else None
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(tokens * latent, config.head), nn.LayerNorm(config.head), nn.ReLU(),
            nn.Linear(config.head, config.head),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] -> embedding [B, T, Z]."""
        h = self.embed(x) + self.encoder_positions()  # [B, T, M]
        z = self.to_latent(self.encoder(h))
        return z if self.mixture is None else z + self.mixture.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Embedding [B, T, Z] -> tokens [B, T, D], zero at padding."""
        h = self.from_latent(z) + self.decoder_positions()  # [B, T, M]
        x = self.to_token(self.decoder(h))
        return (x if self.mixture is None else x + self.mixture.decode(z)) * self.mask

    def project(self, z: Tensor) -> Tensor:
        """Embedding [B, T, Z] -> contrastive features [B, H]."""
        return self.head(z)

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int) -> None:
        """Start as a mixture of principal components of training tokens [n, T, D], the transformer at zero.

        Without a mixture there is nothing to fit: the transformer starts at random, as published.
        """
        if self.mixture is None:
            return
        self.mixture.fit(x, self.mask, seed)
        for output in (self.to_latent, self.to_token):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
