"""The autoencoder: tokens of one checkpoint -> embedding -> tokens, with attention over the tokens of one checkpoint.

Legend: n, B checkpoints, T tokens of one, T' of a stretch, D token size, M model width, Z latent values per token,
K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from weightspace.config import AutoencoderConfig
from weightspace.hyperrep.details import Details
from weightspace.hyperrep.directions import covariance, isotropic, principal_directions, projection_onto
from weightspace.runs import UserError

ROWS_AT_ONCE = 256
"""Checkpoints encoded in one call when details are fitted, so that memory stays bounded."""
MARGIN = 1.5
"""How much farther apart codes lie than the decoder needs to know the component of every training checkpoint."""
UNSEEN = 1e-2
"""Variance expected of networks that were not seen along every direction, as a share of a weight's mean variance."""


class LearnedPositions(nn.Module):
    """Learned vectors for the three positions of a token, summed."""

    def __init__(self, highest: Sequence[int], width: int) -> None:
        super().__init__()
        tables = [nn.Embedding(most + 1, width) for most in highest]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.tables = nn.ModuleList(tables)

    def forward(self, positions: Tensor) -> Tensor:
        """[T, 3] -> [T, M]."""
        return torch.stack([table(column) for table, column in zip(self.tables, positions.unbind(1), strict=True)]).sum(
            0
        )


class SinusoidalPositions(nn.Module):
    """Waves of the three positions of a token (Vaswani et al. 2017, arXiv 1706.03762) and a learned linear map of them.

    Its size does not depend on how many positions there are: layers and units beyond those of training have waves too.
    """

    WAVES = 16
    """Frequencies per position, from 1 to 1/10,000."""

    def __init__(self, highest: Sequence[int], width: int) -> None:
        super().__init__()
        self.map = nn.Linear(2 * self.WAVES * len(highest), width)

    def forward(self, positions: Tensor) -> Tensor:
        """[T, 3] -> [T, M]."""
        frequencies = 10_000 ** -torch.linspace(0, 1, self.WAVES, device=positions.device)
        angles = (positions[:, :, None] * frequencies).flatten(1)  # [T, 3 * WAVES]
        return self.map(torch.cat([angles.sin(), angles.cos()], 1))


POSITIONS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
}


class LinearMixture(nn.Module):
    """Linear autoencoders, chosen by the whole checkpoint: a mixture of principal components of every token.

    Component k has a center c_k in token space, its code e_k in latent space, and a basis of Z directions per position.
    How much of each component a checkpoint gets follows from its distances to the centers (encoder) or the codes
    (decoder), as in a mixture of probabilistic PCA (Tipping and Bishop 1999, "Mixtures of probabilistic principal
    component analyzers"). Members that start from the same weights lie around one center, so that the latent values are
    spent on what training changed. Beside several such components one more lies around the mean of all, for checkpoints
    of which nothing is known.
    """

    spread: Tensor
    """[2]: variance per entry around the centers and around the codes."""

    def __init__(self, components: int, tokens: int, size: int, latent: int) -> None:
        super().__init__()
        self.components = components
        components += components > 1
        self.centers = nn.Parameter(torch.zeros(components, tokens, size))
        self.codes = nn.Parameter(torch.zeros(components, tokens, latent))
        self.encoder = nn.Parameter(torch.zeros(components, tokens, size, latent))
        self.decoder = nn.Parameter(torch.zeros(components, tokens, latent, size))
        self.register_buffer("spread", torch.ones(2))

    def encode(self, x: Tensor, at: slice) -> Tensor:
        """The tokens of some positions [B, T', D] -> [B, T', Z]."""
        return _mapped(x, self.centers[:, at], self.codes[:, at], self.encoder[:, at], self.spread[0])

    def decode(self, z: Tensor, at: slice) -> Tensor:
        """[B, T', Z] -> the tokens of some positions [B, T', D]."""
        return _mapped(z, self.codes[:, at], self.centers[:, at], self.decoder[:, at], self.spread[1])

    @torch.no_grad()
    def fit(self, x: Tensor, mask: Tensor, seed: int, metric: Tensor | None = None) -> None:
        """Start from the k-means clusters of training tokens [n, T, D] and the principal components around them.

        Args:
            x: training tokens.
            mask: which entries are weights [T, D].
            seed: seed of the clusters.
            metric: how much an error of each token costs, a quadratic form per position [T, D, D] (default: its
                square). The components are principal in it, and the encoder projects along it.

        Raises:
            UserError: fewer checkpoints than components.
        """
        components, latent = self.components, self.codes.shape[2]
        if len(x) < components:
            raise UserError(f"autoencoder.components={components} exceeds the {len(x)} training checkpoints; lower it")
        with threadpool_limits(1):  # threads add up the centers in an order that changes from run to run
            clusters: Any = KMeans(components, random_state=seed % 2**32).fit(x.flatten(1).numpy())
        centers = torch.from_numpy(clusters.cluster_centers_).view(components, *x.shape[1:]).to(x)
        labels = torch.from_numpy(clusters.labels_).long()
        residual = x - centers[labels]  # [n, T, D]
        if len(self.centers) > components:
            centers = torch.cat([centers, x.mean(0, keepdim=True)])
        spread = covariance(residual)
        if metric is not None:
            spread = spread + UNSEEN * isotropic(spread, mask)
        basis = principal_directions(spread, latent, metric)  # [T, D, Z]
        projection = projection_onto(basis, metric)  # [T, D, Z]
        self.centers.copy_(centers)
        codes = torch.einsum("ktd,tdr->ktr", centers - x.mean(0), projection)
        within = torch.einsum("ntd,tdr->ntr", residual, projection)
        codes = codes * (MARGIN * _needed(codes, within, labels)).clamp(min=1)
        self.codes.copy_(codes)
        self.encoder.copy_(projection.expand_as(self.encoder))
        self.decoder.copy_(basis.transpose(1, 2).expand_as(self.decoder))
        smallest = 1e-6  # of a variance; keeps the distances finite where checkpoints coincide with their centers
        self.spread[0] = (residual.square().sum() / (len(x) * mask.sum())).clamp(min=smallest)
        self.spread[1] = within.square().mean().clamp(min=smallest)


def _needed(codes: Tensor, within: Tensor, labels: Tensor) -> Tensor:
    """The factor s beyond which every s codes[label] + within is nearer to its own of the s codes than to others.

    Of d = codes[k] - codes[j] and a = within, |a| < |s d + a| as soon as s > -2 d a / |d|^2.
    """
    codes, within = codes.flatten(1), within.flatten(1)
    needed = codes.new_zeros(())
    for k, own in enumerate(codes):
        apart = own - torch.cat([codes[:k], codes[k + 1 :]])  # [K - 1, TZ]
        along = within[labels == k] @ (apart / apart.square().sum(1, keepdim=True).clamp(min=1e-12)).T
        if along.numel():
            needed = torch.maximum(needed, (-2 * along).max())
    return needed


def _shares(x: Tensor, origin: Tensor, spread: Tensor) -> Tensor:
    """Responsibilities of the components around some origins [K, T, I] for x [B, T, I]: [B, K]."""
    flat, origins = x.flatten(1), origin.flatten(1)
    distance = flat.square().sum(1, keepdim=True) + origins.square().sum(1) - 2 * flat @ origins.T  # [B, K]
    return (-0.5 * distance / spread).softmax(1)


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
    share = _shares(x, origin, spread)  # [B, K]
    offset = target - torch.einsum("kti,ktio->kto", origin, basis)  # [K, T, O]
    every = x.transpose(0, 1) @ basis.permute(1, 2, 0, 3).flatten(2)  # [T, B, K * O]
    mapped = torch.einsum("bk,tbko->bto", share, every.unflatten(2, (len(basis), -1)))
    return mapped + torch.einsum("bk,kto->bto", share, offset)


def transformer(width: int, layers: int, heads: int, feedforward: int) -> nn.TransformerEncoder:
    """Pre-norm transformer blocks over [B, T, M], without dropout."""
    block = nn.TransformerEncoderLayer(
        width, heads, feedforward, dropout=0.0, activation=F.relu, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a checkpoint that is too long to be seen as a whole."""

    core: slice
    """the tokens themselves"""
    stretch: slice
    """the same with the halo: what is seen beside them on both sides"""

    @property
    def inner(self) -> slice:
        """The core in the stretch."""
        return slice(self.core.start - self.stretch.start, self.core.stop - self.stretch.start)


def windows_of(count: int, size: int | None, halo: int) -> list[Window]:
    """`count` tokens cut into windows of at most `size` tokens, each with a halo of as many tokens as there are.

    >>> [(w.core.start, w.core.stop, w.stretch.start, w.stretch.stop) for w in windows_of(5, 2, 1)]
    [(0, 2, 0, 3), (2, 4, 1, 5), (4, 5, 3, 5)]
    """
    size = size or count
    cores = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [Window(core, slice(max(core.start - halo, 0), min(core.stop + halo, count))) for core in cores]


class Core(nn.Module):
    """The part of an autoencoder that knows no base network: several share it."""

    def __init__(self, config: AutoencoderConfig, layouts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Build it for tokens with some masks [T, D] and positions [T, 3], one pair per base network."""
        super().__init__()
        width, latent = config.width, config.sketch or config.latent
        (tokens, size), positions = layouts[0][0].shape, torch.cat([positions for _, positions in layouts])
        highest = positions.amax(0).tolist()
        self.embed = nn.Linear(size, width)
        self.encoder_positions = POSITIONS[config.positions](highest, width)
        self.encoder = transformer(width, config.layers, config.heads, config.feedforward)
        self.to_latent = nn.Linear(width, latent)
        self.from_latent = nn.Linear(latent, width)
        self.decoder_positions = POSITIONS[config.positions](highest, width)
        self.decoder = transformer(width, config.layers, config.heads, config.feedforward)
        self.to_token = nn.Linear(width, size)
        self.reduced = False
        """whether the transformer computes in bfloat16"""
        self.averaged = len(layouts) > 1 or config.window is not None or config.positions == "sinusoidal"
        """whether the projection head sees the mean over tokens, since their number varies"""
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(latent if self.averaged else tokens * latent, config.head),
            nn.LayerNorm(config.head), nn.ReLU(), nn.Linear(config.head, config.head),
        )  # fmt: skip

    def run(self, blocks: nn.Module, h: Tensor) -> Tensor:
        """Transformer blocks [B, T, M] -> [B, T, M], their products in bfloat16 where training asks for it."""
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.reduced):
            return blocks(h).float()

    def compile_blocks(self, device: torch.device) -> None:
        """Let torch.compile translate both transformers; names and weights stay as they are.

        Only a compiled forward is translated: `Module.compile` passes over torch's own transformer without a word.

        Raises:
            UserError: nothing can be compiled on this machine.
        """
        try:
            torch.compile(_probe)(torch.ones(1, device=device))
        except Exception as error:  # whatever compilers and their drivers raise
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"pretrain.compile=True: torch.compile does not work here ({reason}); install a C++ "
                "compiler such as g++ (or name yours in the variable CXX), or leave pretrain.compile out"
            ) from None
        for blocks in (self.encoder, self.decoder):
            blocks.forward = torch.compile(blocks.forward)


def _probe(x: Tensor) -> Tensor:
    """Something small to compile."""
    return x + 1


class Autoencoder(nn.Module):
    """Encoder, decoder and projection head for the checkpoints of one base network.

    Beside the transformer runs a mixture of linear autoencoders. It starts as the principal components of the training
    tokens (`fit`) while the transformer's contribution starts at zero, so training begins at the best linear
    compression and spends its steps on what linear maps cannot do. With config.components = 0 it is the transformer
    alone.

    With config.sketch it gives a sketch of a checkpoint in fewer latent values, which `Details` complete.

    With config.window the transformer sees windows of so many tokens and config.halo more on both sides; the embedding
    of a checkpoint is that of its windows, one after another.
    """

    mask: Tensor
    """[T, D]"""
    positions: Tensor
    """[T, 3]"""

    def __init__(
        self,
        config: AutoencoderConfig,
        mask: Tensor,
        positions: Tensor,
        core: Core | None = None,
        input_shape: Sequence[int] = (),
    ) -> None:
        """Build the autoencoder for tokens with this mask [T, D] and these positions [T, 3]; with a core, it is shared.

        One of several that share a core has a learned vector that says which base network it is. Details look at inputs
        of a shape.
        """
        super().__init__()
        tokens, entries = mask.shape
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.windows = windows_of(tokens, config.window, config.halo)
        self.kind = None if core is None else nn.Parameter(torch.zeros(config.width))
        self.core = Core(config, [(mask, positions)]) if core is None else core
        self.mixture = None
        if config.components:
            self.mixture = LinearMixture(config.components, tokens, entries, config.sketch or config.latent)
        size = config.details, config.lots, config.queries
        self.details = Details(mask, *size, input_shape) if config.details else None

    def encode(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] -> embedding [B, T, Z]."""
        parts = [self.encode_at(x[:, window.stretch], window.stretch)[:, window.inner] for window in self.windows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Embedding [B, T, Z] -> tokens [B, T, D], zero at padding."""
        parts = [self.decode_at(z[:, window.stretch], window.stretch)[:, window.inner] for window in self.windows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def encode_at(self, x: Tensor, at: slice) -> Tensor:
        """The tokens of some positions [B, T', D] -> their embedding [B, T', Z], as if there were no others."""
        h = self.core.embed(x) + self._where(self.core.encoder_positions, at)  # [B, T', M]
        z = self.core.to_latent(self.core.run(self.core.encoder, h))
        return z if self.mixture is None else z + self.mixture.encode(x, at)

    def decode_at(self, z: Tensor, at: slice) -> Tensor:
        """The embedding of some positions [B, T', Z] -> their tokens [B, T', D], zero at padding."""
        h = self.core.from_latent(z) + self._where(self.core.decoder_positions, at)  # [B, T', M]
        x = self.core.to_token(self.core.run(self.core.decoder, h))
        return (x if self.mixture is None else x + self.mixture.decode(z, at)) * self.mask[at]

    def _where(self, vectors: nn.Module, at: slice) -> Tensor:
        where = vectors(self.positions[at])
        return where if self.kind is None else where + self.kind

    def project(self, z: Tensor) -> Tensor:
        """Embedding [B, T, Z] -> contrastive features [B, H]."""
        return self.core.head(z.mean(1) if self.core.averaged else z)

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int, metric: Tensor | None = None) -> None:
        """Start as a mixture of principal components of training tokens [n, T, D], the transformer at zero.

        The components are principal in a metric [T, D, D] where one is given.

        Without a mixture there is nothing to fit: the transformer starts at random, as published.
        """
        if self.mixture is None:
            return
        self.mixture.fit(x, self.mask, seed, metric)
        for output in (self.core.to_latent, self.core.to_token):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)

    @torch.no_grad()
    def fit_details(self, x: Tensor, queries: Tensor, real: bool) -> None:
        """Fit the details to what the sketches of training tokens [n, T, D] leave out; see `Details.fit`."""
        if self.details is None:
            return
        left = torch.cat([some - self.decode(self.encode(some)) for some in x.split(ROWS_AT_ONCE)])
        self.details.fit(left, self.positions[:, 1], queries, real)
