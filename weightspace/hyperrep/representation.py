"""What users hold: a hyper-representation that embeds, reconstructs, decodes and generates; one folder on disk.

Legend: n checkpoints, T tokens, D token size, Z latent values per token, W coordinates per token: Z, or with details
those of the sketch and D along the directions of the details, of which T x `details` in all are not zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from weightspace import hub
from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, check, from_dict
from weightspace.hyperrep.autoencoder import Autoencoder, Core
from weightspace.hyperrep.details import Details, Span
from weightspace.hyperrep.sensitivity import MATRICES_AT_ONCE, on_every_core, sensitivities
from weightspace.networks.architectures import Architecture
from weightspace.networks.behavior import input_shape_of
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, read_json, write_json, write_tensors, write_text
from weightspace.tokens.normalize import Normalizer
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.zoo.model_zoo import ZOO_FILE

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
NORMALIZATION_FILE = "normalization.safetensors"
SHARED_FILES = (CONFIG_FILE, MODEL_FILE, NORMALIZATION_FILE)
"""What a representation consists of, beside its card."""
STATE_FILE = "state.json"
"""Where an unfinished training resumes."""
ROWS_AT_ONCE = 256
"""Checkpoints embedded or decoded in one call, so that memory stays bounded."""
SAME = 0.01
"""How far checksums of the same directions may differ by rounding."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n checkpoints."""

    z: Tensor
    """[n, T, W]"""
    frame: pd.DataFrame
    """The n rows of the checkpoints they came from."""
    architecture: Architecture
    """Their base network."""


Sampler = Callable[[Embeddings, int, torch.Generator], Tensor]
"""(embeddings of anchors, how many, generator) -> new embeddings [count, T, W]."""


@dataclass(frozen=True)
class Decoding:
    """How n embeddings are decoded: what their values are, and what other values in their place would give.

    With details the values are those of the details, in their span; the sketch stays as it is. Else they are the
    embeddings themselves.
    """

    autoencoder: Autoencoder
    z: Tensor
    """[n, T, W]: the embeddings"""
    sketch: Tensor | None = None
    """[n, T, D]: with details, the tokens of their sketches"""
    span: Span | None = None
    """with details, where they lie"""

    @property
    def values(self) -> Tensor:
        """Their values [n, T, R]."""
        return self.z if self.span is None else self.span.values(self.z[..., -self.autoencoder.mask.shape[1] :])

    @property
    def rounds(self) -> int:
        """In how many lots the values come, of which each says where the next one lies."""
        return 1 if self.span is None else len(self.span.lots)

    def free(self, settled: int) -> Tensor:
        """Which values may move when those of the first lots are settled: [n, T, R]."""
        return torch.ones_like(self.z) if self.span is None else self.span.lot > settled

    def tokens(self, values: Tensor | None = None) -> Tensor:
        """Normalized tokens [n, T, D] of other values [n, T, R], or of their own."""
        values = self.values if values is None else values
        if self.span is None or self.sketch is None:
            return self.autoencoder.decode(values)
        return self.sketch + self.span.details.tokens(self.span.told(values))

    def embeddings(self, values: Tensor) -> Tensor:
        """The embeddings [n, T, W] that have other values [n, T, R]."""
        if self.span is None:
            return values
        return torch.cat([self.z[..., : -self.autoencoder.mask.shape[1]], self.span.told(values)], 2)


class HyperRepresentation:
    """A trained autoencoder together with everything that is needed to use it, for the checkpoints of one base network.

    A representation of several base networks is one of these for each (`siblings`); they share the transformer.
    `on(architecture)` is that of a base network; embedding, decoding and generating choose it themselves.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        autoencoder_config: AutoencoderConfig,
        autoencoder: Autoencoder,
        normalizer: Normalizer,
        info: dict[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.architecture = tokenizer.architecture
        self.autoencoder_config = autoencoder_config
        self.autoencoder = autoencoder
        self.normalizer = normalizer
        self.info = info
        """How it was trained: tasks, zoo, loss, pretrain, seed, scales of the losses, validation."""
        self.siblings: tuple[HyperRepresentation, ...] = (self,)
        """Those that share the transformer, itself included."""

    @staticmethod
    def joined(several: Sequence[HyperRepresentation]) -> HyperRepresentation:
        """Make representations that share a transformer siblings of each other; returns the first."""
        for each in several:
            each.siblings = tuple(several)
        return several[0]

    def on(self, architecture: Architecture) -> HyperRepresentation:
        """The representation for checkpoints of a base network.

        Raises:
            UserError: it was not trained on such.
        """
        for sibling in self.siblings:
            if sibling.architecture == architecture:
                return sibling
        trained = ", ".join(str(sibling.architecture) for sibling in self.siblings)
        raise UserError(
            f"the representation is of {trained}, the checkpoints are of {architecture}; pretrain a representation on "
            "such a zoo"
        )

    @property
    def modules(self) -> nn.ModuleList:
        """Everything that is trained."""
        return nn.ModuleList([sibling.autoencoder for sibling in self.siblings])

    def state(self) -> dict[str, Tensor]:
        """Everything that is trained by name, what siblings share once."""
        return once(self.modules.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        shared = {key.replace("0.", f"{i}.", 1): value for i in range(len(self.siblings)) for key, value in
                  state.items() if key.startswith("0.core.")}  # fmt: skip
        self.modules.load_state_dict({**shared, **state})

    @property
    def device(self) -> torch.device:
        """Where the autoencoder lies."""
        return self.autoencoder.mask.device

    @property
    def fingerprint(self) -> str:
        """Digest of what it computes: base network, size, weights and normalization."""
        networks = ", ".join(str(sibling.architecture) for sibling in self.siblings)
        digest = hashlib.sha256(f"{networks} {self.autoencoder_config}".encode())
        for name, value in sorted((self.state() | self._scales()).items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _scales(self) -> dict[str, Tensor]:
        """What the siblings' normalizers subtract and divide by."""
        each = enumerate(sibling.normalizer for sibling in self.siblings)
        return {k: v for i, own in each for k, v in ((f"{i}.mean", own.mean), (f"{i}.std", own.std))}

    @property
    def latent_size(self) -> int:
        """Latent values per checkpoint, T x Z."""
        return self.tokenizer.count * self.autoencoder_config.latent

    def tokens(self, weights: dict[str, Tensor]) -> Tensor:
        """Normalized tokens [n, T, D] of stacked weights {name: [n, *shape]}."""
        return self.normalizer.normalize(self.tokenizer.tokenize(weights).x)

    def cpu_tokens(self, weights: dict[str, Tensor]) -> Tensor:
        """`tokens`, for weights that lie on the CPU, wherever the representation is."""
        return self.normalizer.to("cpu").normalize(self.tokenizer.tokenize(weights).x)

    def weights(self, tokens: Tensor) -> dict[str, Tensor]:
        """Stacked weights {name: [n, *shape]} of normalized tokens [n, T, D]; the inverse of `tokens`.

        Running variances below zero, which no network has, become zero.
        """
        weights = self.tokenizer.detokenize(self.normalizer.denormalize(tokens))
        return weights | {name: weights[name].clamp(min=0) for name in self.tokenizer.variances}

    @torch.no_grad()
    def embed(self, checkpoints: Checkpoints) -> Embeddings:
        """Embed checkpoints, in bounded memory.

        Raises:
            UserError: they are of another base network.
        """
        self = self.on(checkpoints.architecture)
        parts = []
        for start in range(0, len(checkpoints), self.at_once):
            chunk = {k: w[start : start + self.at_once].to(self.device) for k, w in checkpoints.weights.items()}
            parts.append(self.encode(self.tokens(chunk)).z.cpu())
        return Embeddings(torch.cat(parts), checkpoints.frame, self.architecture)

    @torch.no_grad()
    def decode(self, embeddings: Embeddings) -> Checkpoints:
        """Checkpoints from embeddings, in bounded memory."""
        self = self.on(embeddings.architecture)
        parts = [self.weights(self.decoding(z.to(self.device)).tokens()) for z in embeddings.z.split(self.at_once)]
        weights = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return Checkpoints(self.architecture, weights, embeddings.frame)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Decoding:
        """Normalized tokens [n, T, D], on its device -> their embeddings, and how these are decoded."""
        z, details = self.autoencoder.encode(x), self.autoencoder.details
        if details is None:
            return Decoding(self.autoencoder, z)
        left = details.along_axes(x - self.autoencoder.decode(z))
        return self._detailed(z, lambda span: span.values(left))

    @torch.no_grad()
    def decoding(self, z: Tensor) -> Decoding:
        """How embeddings [n, T, W], on the representation's device, are decoded."""
        if self.autoencoder.details is None:
            return Decoding(self.autoencoder, z)
        z, left = z.tensor_split([-self.tokenizer.token_size], 2)
        return self._detailed(z, lambda span: span.values(left))

    def _detailed(self, z: Tensor, told: Callable[[Span], Tensor]) -> Decoding:
        """Sketches and their details, of which every lot knows what the lots before it tell.

        Args:
            z: the latent values of the sketches [n, T, Z - details].
            told: the span so far -> the values [n, T, R] along it.
        """
        details, sketch, span = self._details, self.autoencoder.decode(z), None
        left = sketch.new_zeros(*z.shape[:2], self.tokenizer.token_size)
        for count in details.counts:
            weights = self.weights(sketch + details.tokens(left))
            networks = Checkpoints(self.architecture, weights, pd.DataFrame(index=range(len(z))))
            grown = partial(self._grown, details, networks, span, count)
            span = Span.joined(on_every_core(grown, len(z), self._matrices, self.device))
            left = span.told(told(span))
        return Decoding(self.autoencoder, torch.cat([z, left], 2), sketch, span)

    @torch.no_grad()
    def _grown(self, details: Details, networks: Checkpoints, span: Span | None, count: int, part: slice) -> Span:
        """A span, if there is one, and the `count` directions beside it that matter most to some of the networks."""
        some, real = networks.rows(np.arange(len(networks))[part]), bool(details.real)
        matrices = sensitivities(self.tokenizer, self.normalizer, some, details.queries, real, seed=0)
        return details.span(matrices, count, span and span.of(part))

    @property
    def _matrices(self) -> int:
        """Checkpoints whose matrices are worked on together."""
        tokens, size = self.tokenizer.mask.shape
        return max(MATRICES_AT_ONCE // (tokens * size**2), 1)

    @property
    def at_once(self) -> int:
        """Checkpoints that are decoded together, so that memory stays bounded."""
        return ROWS_AT_ONCE if self.autoencoder.details is None else min(ROWS_AT_ONCE, 8 * self._matrices)

    @torch.no_grad()
    def packed(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """The latent values of embeddings alone, all that decoding needs: {"z": [n, T, Z]}.

        With details: {"sketch": [n, T, Z - details], "details": [n, T x details], "directions": [n]}. The details stand
        lot by lot and token by token, along directions that each checkpoint's sketch has chosen: they are no features.
        The last tells these directions from others.
        """
        self = self.on(embeddings.architecture)
        if self.autoencoder.details is None:
            return {"z": embeddings.z}
        found = []
        for z in embeddings.z.split(self.at_once):
            sketch, left = z.to(self.device).tensor_split([-self.tokenizer.token_size], 2)
            lots: list[Tensor] = []

            def told(span: Span, left: Tensor = left, lots: list[Tensor] = lots) -> Tensor:
                values = span.values(left)
                lots.append(values[span.lots[-1]].unflatten(0, (len(left), -1)))
                return values

            span = self._detailed(sketch, told).span
            assert span is not None
            found.append((sketch.cpu(), torch.cat(lots, 1).cpu(), span.checksum().cpu()))
        return dict(zip(("sketch", "details", "directions"), map(torch.cat, zip(*found, strict=True)), strict=True))

    def unpacked(self, values: Mapping[str, Tensor], frame: pd.DataFrame, architecture: Architecture) -> Embeddings:
        """The embeddings of some checkpoints of which these are the latent values; the inverse of `packed`.

        Raises:
            UserError: they are of another representation, or were packed where the arithmetic differs.
        """
        self = self.on(architecture)
        try:
            if self.autoencoder.details is None:
                return Embeddings(values["z"], frame, architecture)
            parts = [values[name].split(self.at_once) for name in ("sketch", "details", "directions")]
            z = torch.cat([self._unpacked(*part) for part in zip(*parts, strict=True)])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"these are not the latent values of this representation: {error}") from None
        return Embeddings(z, frame, architecture)

    @torch.no_grad()
    def _unpacked(self, sketch: Tensor, details: Tensor, checksum: Tensor) -> Tensor:
        """The embeddings [n, T, W] of which `packed` gave these."""
        lots = details.to(self.device).split(self._details.counts, 1)

        def told(span: Span) -> Tensor:
            values = details.new_zeros(span.lot.shape, device=self.device)
            for places, own in zip(span.lots, lots, strict=False):  # of the lots so far
                values[places] = own.flatten()
            return values

        decoding = self._detailed(sketch.to(self.device), told)
        assert decoding.span is not None
        if not torch.allclose(decoding.span.checksum().cpu(), checksum, rtol=0, atol=SAME):
            raise UserError(
                "the sketches choose other directions here than where they were packed (another representation, or a "
                "machine whose arithmetic differs); embed the checkpoints again on this machine"
            )
        return decoding.z.cpu()

    @property
    def _details(self) -> Details:
        assert self.autoencoder.details is not None
        return self.autoencoder.details

    def reconstruct(self, checkpoints: Checkpoints) -> Checkpoints:
        """Checkpoint -> embedding -> checkpoint."""
        return self.decode(self.embed(checkpoints))

    def generate(self, count: int, sampler: Sampler, anchors: Checkpoints, seed: int = 0) -> Checkpoints:
        """New networks: embed the anchors, draw `count` embeddings with the sampler, decode them."""
        generator = torch.Generator().manual_seed(seed)
        z = sampler(self.embed(anchors), count, generator)
        return self.decode(Embeddings(z, pd.DataFrame({"network": range(count)}), anchors.architecture))

    def to(self, device: torch.device | str) -> HyperRepresentation:
        """Move the autoencoder and the normalizer to a device, and those of the siblings."""
        for sibling in self.siblings:
            sibling.autoencoder.to(device)
            sibling.normalizer = sibling.normalizer.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Write the representation as one folder."""
        folder = Path(folder)
        files = {
            NORMALIZATION_FILE: write_tensors(folder / NORMALIZATION_FILE, self._scales()),
            MODEL_FILE: write_tensors(folder / MODEL_FILE, self.state()),
        }
        write_text(folder / hub.CARD_FILE, model_card(self, "path/to/this/folder"))
        networks = [
            {
                **sibling.architecture.to_json(),
                "parameter_count": sibling.architecture.parameter_count,
                "latent_size": sibling.latent_size,
            }
            for sibling in self.siblings
        ]
        size = dataclasses.asdict(self.autoencoder_config)
        write_json(folder / CONFIG_FILE, {"networks": networks, "autoencoder": size, "files": files, **self.info})

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> HyperRepresentation:
        """Load a representation from its folder.

        Raises:
            UserError: the folder is not a representation or is damaged.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file():
            unfinished = (folder / STATE_FILE).is_file()
            reason = "its training was interrupted, run the same command again" if unfinished else f"no {CONFIG_FILE}"
            reason = "it is a zoo (the zoo comes first)" if (folder / ZOO_FILE).is_file() else reason
            reason = reason if folder.exists() else "it does not exist"
            raise UserError(f"{folder} is not a representation: {reason}")
        info = read_json(folder / CONFIG_FILE)
        try:
            networks = [Architecture(entry["name"], entry["arguments"]) for entry in info.pop("networks")]
            size = from_dict(AutoencoderConfig, info.pop("autoencoder"))
            check(size, "autoencoder")
            files = info.pop("files")
            weights, scales = (_read(folder / name, files[name]) for name in (MODEL_FILE, NORMALIZATION_FILE))
            tokenizers, normalizers = [], []
            for i, architecture in enumerate(networks):
                if architecture.parameter_count > scales[f"{i}.mean"].numel():  # before the tokens are laid out
                    raise ValueError(f"{architecture} has more weights than {NORMALIZATION_FILE} has entries")
                tokenizers.append(Tokenizer(architecture, size.token_size))
                mask = tokenizers[-1].mask
                if not scales[f"{i}.mean"].shape == scales[f"{i}.std"].shape == mask.shape:
                    raise ValueError(f"{NORMALIZATION_FILE} does not hold the tokens of {architecture}")
                normalizers.append(Normalizer(scales[f"{i}.mean"], scales[f"{i}.std"], mask))
            with torch.device("meta"):  # no memory is taken before the shapes are known to be those of the file
                sizes = once(nn.ModuleList(autoencoders(size, tokenizers)).state_dict())
            wrong = [name for name in sizes if name not in weights or weights[name].shape != sizes[name].shape]
            if wrong:
                raise ValueError(f"{MODEL_FILE} does not hold {wrong[0]} as the config describes it")
            representation = assembled(size, tokenizers, normalizers, info)
            representation.load_state(weights)
            from_dict(PretrainConfig, info["pretrain"])
            from_dict(LossConfig, info["loss"])
            if not {"validation", "step", "tasks", "scales"} <= info.keys():
                raise KeyError("validation, step, tasks or scales")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"the representation {folder} is damaged or of another version: {error}") from None
        representation.modules.eval()
        return representation.to(device)

    @classmethod
    def from_hub(cls, repository: str, revision: str | None = None) -> HyperRepresentation:
        """Load a representation of the hub ("owner/name", downloaded once) or of a local folder.

        Raises:
            UserError: no such repository, or what it holds is not a representation.
        """
        return cls.load(hub.fetch(repository, "model", SHARED_FILES, revision))

    def push_to_hub(self, repository: str | Path, private: bool = False) -> str:
        """Share the representation as a model of the hub, with a card; see `hub.push`. Returns where it is."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return hub.push(Path(folder), repository, "model", SHARED_FILES, model_card(self, str(repository)), private)

    @property
    def pretrain_config(self) -> PretrainConfig:
        """How it was trained."""
        return from_dict(PretrainConfig, self.info["pretrain"])

    @property
    def loss_config(self) -> LossConfig:
        """The losses that it was trained with."""
        return from_dict(LossConfig, self.info["loss"])


def _read(path: Path, written: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file; raises a ValueError where it is not as it was written."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != written["sha256"]:
        raise ValueError(f"{path.name} has changed since it was written (its checksum differs)")
    return load(content)


def once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `HyperRepresentation.modules`, what they share only under the first."""
    return {k: v for k, v in state.items() if k.startswith("0.") or ".core." not in k}


def autoencoders(config: AutoencoderConfig, tokenizers: Sequence[Tokenizer]) -> list[Autoencoder]:
    """Untrained autoencoders for one or several base networks; several share the transformer."""
    shapes = [(tokenizer.mask, tokenizer.positions) for tokenizer in tokenizers]
    core = Core(config, shapes) if len(shapes) > 1 else None
    inputs = [input_shape_of(each.architecture.build()) if config.details else () for each in tokenizers]
    return [Autoencoder(config, *shape, core, takes) for shape, takes in zip(shapes, inputs, strict=True)]


def assembled(
    config: AutoencoderConfig, tokenizers: Sequence[Tokenizer], normalizers: Sequence[Normalizer], info: dict[str, Any]
) -> HyperRepresentation:
    """An untrained representation of one or several base networks, on the CPU; see `HyperRepresentation.info`."""
    each = zip(tokenizers, autoencoders(config, tokenizers), normalizers, strict=True)
    return HyperRepresentation.joined(
        [HyperRepresentation(tokenizer, config, made, normalizer, info) for tokenizer, made, normalizer in each]
    )


def model_card(representation: HyperRepresentation, place: str) -> str:
    """README.md of a representation: what it is, how to load it from a place (folder or hub), how it validated."""
    info = representation.info
    sizes = "; ".join(
        f"{each.architecture}: {each.tokenizer.count} tokens of {each.tokenizer.token_size}, {each.latent_size} latent "
        f"values, {each.architecture.parameter_count / each.latent_size:.2f} weights per latent value"
        for each in representation.siblings
    )
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in info["validation"].items() if value is not None)
    details = representation.autoencoder.details
    contains = ""
    if details is not None:
        inputs = f"{len(details.queries)} inputs ({info['loss']['query_set']})"
        contains = f"\nIts details were chosen on {inputs}, which the file contains.\n"
    return f"""---
library_name: weightspace
tags: [hyper-representation, weight-space-learning]
---
# Hyper-representation of {" and ".join(str(each.architecture) for each in representation.siblings)}

A mixture of linear autoencoders beside a transformer autoencoder, over the weights of {info["zoo"]["members"]}
trained networks (task {", ".join(info["tasks"])}; {sizes}), trained with weightspace (the losses of arXiv 2503.17138):
{", ".join(f"{key} {value}" for key, value in info["loss"].items())}.
{contains}
```python
import weightspace as ws
representation = ws.HyperRepresentation.from_hub("{place}")
z = representation.embed(ws.ModelZoo.open("path/to/a/zoo").select(split="test")).z
```

| validation, step {info["step"]} | |
|---|---|
{rows}
"""
