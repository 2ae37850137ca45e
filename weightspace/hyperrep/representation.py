"""What users hold: a hyper-representation that embeds, reconstructs, decodes and generates; one folder on disk.

Legend: n checkpoints, T tokens, D token size, Z latent values per token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weightspace import hub
from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, from_dict
from weightspace.hyperrep.autoencoder import Autoencoder
from weightspace.networks.architectures import Architecture
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
STATE_FILE = "state.pt"
"""What an unfinished training resumes from."""
ROWS_AT_ONCE = 256
"""Checkpoints embedded or decoded in one call, so that memory stays bounded."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n checkpoints."""

    z: Tensor
    """[n, T, Z]"""
    frame: pd.DataFrame
    """The n rows of the checkpoints they came from."""


Sampler = Callable[[Embeddings, int, torch.Generator], Tensor]
"""(embeddings of anchors, how many, generator) -> new embeddings [count, T, Z]."""


class HyperRepresentation:
    """A trained autoencoder together with everything that is needed to use it."""

    def __init__(
        self,
        architecture: Architecture,
        autoencoder_config: AutoencoderConfig,
        autoencoder: Autoencoder,
        normalizer: Normalizer,
        info: dict[str, Any],
    ) -> None:
        self.architecture = architecture
        self.autoencoder_config = autoencoder_config
        self.autoencoder = autoencoder
        self.normalizer = normalizer
        self.info = info
        """How it was trained: tasks, zoo, loss, pretrain, seed, scales of the losses, validation."""
        self.tokenizer = Tokenizer(architecture, autoencoder_config.token_size)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder lies."""
        return self.autoencoder.mask.device

    @property
    def fingerprint(self) -> str:
        """Digest of what it computes: base network, size, weights and normalization."""
        state = {**self.autoencoder.state_dict(), "mean": self.normalizer.mean, "std": self.normalizer.std}
        digest = hashlib.sha256(f"{self.architecture} {self.autoencoder_config}".encode())
        for name, value in sorted(state.items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

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
        self.tokenizer.check_architecture(checkpoints.architecture)
        parts = []
        for start in range(0, len(checkpoints), ROWS_AT_ONCE):
            chunk = {k: w[start : start + ROWS_AT_ONCE].to(self.device) for k, w in checkpoints.weights.items()}
            parts.append(self.autoencoder.encode(self.tokens(chunk)).cpu())
        return Embeddings(torch.cat(parts), checkpoints.frame)

    @torch.no_grad()
    def decode(self, embeddings: Embeddings) -> Checkpoints:
        """Checkpoints from embeddings, in bounded memory."""
        parts = [self.weights(self.autoencoder.decode(z.to(self.device))) for z in embeddings.z.split(ROWS_AT_ONCE)]
        weights = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return Checkpoints(self.architecture, weights, embeddings.frame)

    def reconstruct(self, checkpoints: Checkpoints) -> Checkpoints:
        """Checkpoint -> embedding -> checkpoint."""
        return self.decode(self.embed(checkpoints))

    def generate(self, count: int, sampler: Sampler, anchors: Checkpoints, seed: int = 0) -> Checkpoints:
        """New networks: embed the anchors, draw `count` embeddings with the sampler, decode them."""
        generator = torch.Generator().manual_seed(seed)
        z = sampler(self.embed(anchors), count, generator)
        return self.decode(Embeddings(z, pd.DataFrame({"network": range(count)})))

    def to(self, device: torch.device | str) -> HyperRepresentation:
        """Move the autoencoder and the normalizer to a device."""
        self.autoencoder.to(device)
        self.normalizer = self.normalizer.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Write the representation as one folder."""
        folder = Path(folder)
        write_tensors(folder / NORMALIZATION_FILE, {"mean": self.normalizer.mean, "std": self.normalizer.std})
        write_tensors(folder / MODEL_FILE, self.autoencoder.state_dict())
        write_text(folder / hub.CARD_FILE, model_card(self, "path/to/this/folder"))
        config = {
            "architecture": self.architecture.to_json(),
            "autoencoder": dataclasses.asdict(self.autoencoder_config),
            "parameter_count": self.architecture.parameter_count,
            "latent_size": self.latent_size,
            **self.info,
        }
        write_json(folder / CONFIG_FILE, config)

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
            architecture = Architecture(**info.pop("architecture"))
            autoencoder_config = from_dict(AutoencoderConfig, info.pop("autoencoder"))
            weights = load_file(folder / MODEL_FILE)
            tokens, size = len(weights["encoder_positions.tables.0.weight"]), weights["embed.weight"].shape[1]
            if architecture.parameter_count > tokens * size:  # before the tokens are laid out
                raise ValueError(f"{architecture} has more weights than {tokens} tokens of {size} hold")
            for derived in ("parameter_count", "latent_size"):
                info.pop(derived)
            tokenizer = Tokenizer(architecture, autoencoder_config.token_size)
            scales = load_file(folder / NORMALIZATION_FILE)
            normalizer = Normalizer(scales["mean"], scales["std"], tokenizer.mask)
            with torch.device("meta"):  # no memory is taken before the shapes are known to be those of the file
                sizes = Autoencoder(autoencoder_config, tokenizer.mask, tokenizer.positions).state_dict()
            wrong = [name for name in sizes if name not in weights or weights[name].shape != sizes[name].shape]
            if wrong:
                raise ValueError(f"{MODEL_FILE} does not hold {wrong[0]} as the config describes it")
            autoencoder = Autoencoder(autoencoder_config, tokenizer.mask, tokenizer.positions)
            autoencoder.load_state_dict(weights)
            from_dict(PretrainConfig, info["pretrain"])
            from_dict(LossConfig, info["loss"])
            if not {"validation", "step", "tasks", "scales"} <= info.keys():
                raise KeyError("validation, step, tasks or scales")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"the representation {folder} is damaged or of another version: {error}") from None
        return cls(architecture, autoencoder_config, autoencoder.eval(), normalizer, info).to(device)

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


def model_card(representation: HyperRepresentation, place: str) -> str:
    """README.md of a representation: what it is, how to load it from a place (folder or hub), how it validated."""
    info = representation.info
    tokens = f"{representation.tokenizer.count} tokens of {representation.tokenizer.token_size}"
    per_value = representation.architecture.parameter_count / representation.latent_size
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in info["validation"].items() if value is not None)
    return f"""---
library_name: weightspace
tags: [hyper-representation, weight-space-learning]
---
# Hyper-representation of {representation.architecture}

A mixture of linear autoencoders beside a transformer autoencoder, over the weights of {info["zoo"]["members"]}
trained networks (task {", ".join(info["tasks"])}; {tokens}, {representation.latent_size} latent values,
{per_value:.2f} weights per latent value), trained with weightspace (the losses of arXiv 2503.17138):
{", ".join(f"{key} {value}" for key, value in info["loss"].items())}.

```python
import weightspace as ws
representation = ws.HyperRepresentation.from_hub("{place}")
z = representation.embed(ws.ModelZoo.open("path/to/a/zoo").select(split="test")).z
```

| validation, step {info["step"]} | |
|---|---|
{rows}
"""
