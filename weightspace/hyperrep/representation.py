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
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from weightspace import hub
from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, check, from_dict
from weightspace.hyperrep.autoencoder import Autoencoder, Core
from weightspace.hyperrep.sensitivity import MATRICES_AT_ONCE, sensitivities
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
    """How embeddings around some given ones are decoded: with details, the sketches stay, and which directions count.

    As a function: embeddings [n, T, W] -> normalized tokens [n, T, D].
    """

    autoencoder: Autoencoder
    z: Tensor
    """[n, T, W]: the given embeddings"""
    sketch: Tensor | None = None
    """[n, T, D]: with details, the tokens of their sketches"""
    kept: Tensor | None = None
    """[n, T, D]: with details, the directions along which they lie"""

    def __call__(self, z: Tensor) -> Tensor:
        if self.autoencoder.details is None or self.sketch is None or self.kept is None:
            return self.autoencoder.decode(z)
        return self.sketch + self.autoencoder.details(z[..., -self.kept.shape[2] :] * self.kept)

    def directions(self, rows: slice) -> Tensor | None:
        """What one unit of each of the last R coordinates adds to its token: [n, T, R, D]; None if it is not linear."""
        if self.autoencoder.details is not None and self.kept is not None:
            return self.autoencoder.details.directions(self.kept[rows])
        return None if self.autoencoder.mixture is None else self.autoencoder.mixture.directions(self.z[rows])


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
        for start in range(0, len(checkpoints), ROWS_AT_ONCE):
            chunk = {k: w[start : start + ROWS_AT_ONCE].to(self.device) for k, w in checkpoints.weights.items()}
            parts.append(self.encode(self.tokens(chunk)).cpu())
        return Embeddings(torch.cat(parts), checkpoints.frame, self.architecture)

    @torch.no_grad()
    def decode(self, embeddings: Embeddings) -> Checkpoints:
        """Checkpoints from embeddings, in bounded memory."""
        self = self.on(embeddings.architecture)
        each = (z.to(self.device) for z in embeddings.z.split(ROWS_AT_ONCE))
        parts = [self.weights(self.decoding(z)(z)) for z in each]
        weights = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return Checkpoints(self.architecture, weights, embeddings.frame)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Normalized tokens [n, T, D], on its device -> embeddings [n, T, W]."""
        z, details = self.autoencoder.encode(x), self.autoencoder.details
        if details is None:
            return z
        coordinates = []
        for some, tokens in zip(self.autoencoder.decode(z).split(self._matrices), x.split(self._matrices), strict=True):
            matrices = self._seen(some)
            coordinates.append(details.code(tokens - some, matrices, details.kept(matrices)))
        return torch.cat([z, torch.cat(coordinates)], 2)

    @torch.no_grad()
    def decoding(self, z: Tensor) -> Decoding:
        """How embeddings around z [n, T, W], on the representation's device, are decoded."""
        details = self.autoencoder.details
        if details is None:
            return Decoding(self.autoencoder, z)
        sketch = self.autoencoder.decode(z[..., : -self.tokenizer.token_size])
        kept = torch.cat([details.kept(self._seen(some)) for some in sketch.split(self._matrices)])
        return Decoding(self.autoencoder, z, sketch, kept)

    def _seen(self, sketch: Tensor) -> Tensor:
        """The Gauss-Newton matrices of sketches [n, T, D] on the queries of the details: [n, T, D, D]."""
        details = self.autoencoder.details
        assert details is not None
        networks = Checkpoints(self.architecture, self.weights(sketch), pd.DataFrame(index=range(len(sketch))))
        return sensitivities(self.tokenizer, self.normalizer, networks, details.queries, bool(details.real), seed=0)

    @property
    def _matrices(self) -> int:
        """Checkpoints whose matrices are worked on together."""
        tokens, size = self.tokenizer.mask.shape
        return max(MATRICES_AT_ONCE // (tokens * size**2), 1)

    def packed(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """The latent values of embeddings alone, all that decoding needs: {"z": [n, T, Z]}.

        With details: {"sketch": [n, T, Z - details], "details": [n, T x details], "directions": [n]}. The details stand
        token by token, along directions that each checkpoint's sketch has chosen: they are no features. The last is a
        checksum of that choice.
        """
        self = self.on(embeddings.architecture)
        if self.autoencoder.details is None:
            return {"z": embeddings.z}
        sketch, coordinates = embeddings.z.tensor_split([-self.tokenizer.token_size], 2)
        kept = self._kept(embeddings.z)
        details = coordinates[kept].unflatten(0, (len(sketch), -1))
        return {"sketch": sketch, "details": details, "directions": _checksum(kept)}

    def unpacked(self, values: Mapping[str, Tensor], frame: pd.DataFrame, architecture: Architecture) -> Embeddings:
        """The embeddings of some checkpoints of which these are the latent values; the inverse of `packed`.

        Raises:
            UserError: they are of another representation, or were packed where the arithmetic differs.
        """
        self = self.on(architecture)
        details, size = self.autoencoder.details, self.tokenizer.token_size
        try:
            if details is None:
                return Embeddings(values["z"], frame, architecture)
            sketch = values["sketch"]
            z = torch.cat([sketch, sketch.new_zeros(len(sketch), self.tokenizer.count, size)], 2)
            kept = self._kept(z)
            same = torch.equal(_checksum(kept), values["directions"])
            z[..., -size:][kept] = values["details"].flatten()
        except (KeyError, RuntimeError) as error:
            raise UserError(f"these are not the latent values of this representation: {error}") from None
        if not same:
            raise UserError(
                "the sketches choose other directions here than where they were packed (another representation, or a "
                "machine whose arithmetic differs); embed the checkpoints again on this machine"
            )
        return Embeddings(z, frame, architecture)

    def _kept(self, z: Tensor) -> Tensor:
        """Along which directions the details of embeddings [n, T, W] lie, on the CPU: [n, T, D]."""
        parts = [self.decoding(some.to(self.device)).kept for some in z.split(ROWS_AT_ONCE)]
        return torch.cat([part.cpu() for part in parts if part is not None])

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


def _checksum(kept: Tensor) -> Tensor:
    """A number for each choice of directions [n, T, D]: [n]."""
    places = torch.arange(1, kept[0].numel() + 1)
    return (kept.flatten(1) * places * (places + 7)).sum(1)


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
