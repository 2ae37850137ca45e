"""One pretraining step at the published size, with and without the behavioral loss, beside the published recipe's step.

CNN3: 93 tokens of 289, width 256, 8 + 8 layers, 8 heads, feed-forward 2048, 64 latent values per token; 16 checkpoints
in two views, 256 queries of 3x32x32. The published step is rebuilt here from its description (REFERENCE of the method:
arXiv 2503.17138): both views are decoded and compared, all networks run in one vmapped call, targets computed per view.

    python benchmarks/pretrain_step.py [--rounds 3] [--small] [--options]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch.func import functional_call, vmap

from weightspace.config import AutoencoderConfig, LossConfig
from weightspace.hyperrep import losses
from weightspace.hyperrep.autoencoder import Autoencoder
from weightspace.hyperrep.pretrain import Setting, step_losses
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture, initialize
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.symmetry import groups_of
from weightspace.tokens.normalize import standardize
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.tokens.views import permuted

PUBLISHED = AutoencoderConfig(width=256, layers=8, heads=8, feedforward=2048, latent=64, components=1)
SMALL = AutoencoderConfig()


def checkpoints_of(architecture: Architecture, count: int) -> Checkpoints:
    """Freshly initialized networks: the cost of a step does not depend on their training."""
    generator = torch.Generator().manual_seed(0)
    each = [initialize(architecture, "kaiming_uniform", generator) for _ in range(count)]
    weights = {name: torch.stack([one[name] for one in each]) for name in architecture.shapes}
    return Checkpoints(architecture, weights, pd.DataFrame({"member": range(count)}))


def setting_of(
    checkpoints: Checkpoints, config: AutoencoderConfig, loss: LossConfig, queries: int, device: torch.device
) -> Setting:
    """A representation that was never trained, ready for a step."""
    tokenizer = Tokenizer(checkpoints.architecture, config.token_size)
    normalizer = standardize(tokenizer, tokenizer.tokenize(checkpoints.weights).x)
    torch.manual_seed(0)
    autoencoder = Autoencoder(config, tokenizer.mask, tokenizer.positions)
    representation = HyperRepresentation(tokenizer, config, autoencoder, normalizer, {}).to(device)
    group = behavior.calibrate(checkpoints.architecture, device, queries, len(checkpoints), training=True)
    scales = {"contrastive": 1.0, "structural": 1.0, "behavioral": 1.0, "cycle": 1.0}
    network = checkpoints.architecture.build().to(device)
    return Setting(representation, loss, network, losses.distance_of(loss), group, scales)


def ours(setting: Setting, weights: dict[str, torch.Tensor], queries: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and update as `weightspace pretrain` does them."""
    optimizer = torch.optim.AdamW(setting.representation.autoencoder.parameters(), 1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        optimizer.zero_grad()
        step_losses(setting, weights, queries, 1.0, generator)["total"].backward()
        optimizer.step()

    return step


def published(setting: Setting, weights: dict[str, torch.Tensor], queries: torch.Tensor) -> Callable[[], None]:
    """The published recipe's step: both views decoded, every network of both views run, in one vmapped call."""
    representation, network = setting.representation, setting.network
    autoencoder, groups = representation.autoencoder, groups_of(representation.architecture)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), 1e-4)
    generator = torch.Generator().manual_seed(0)
    run = vmap(lambda w: functional_call(network, w, (queries,)))

    def step() -> None:
        optimizer.zero_grad()
        views = [permuted(weights, groups, generator) for _ in range(2)]
        both = {name: torch.cat([view[name] for view in views]) for name in weights}
        x = representation.tokens(both)
        z = autoencoder.encode(x)
        x_hat = autoencoder.decode(z)
        total = 0.05 * losses.contrastive(*autoencoder.project(z).chunk(2))
        total = total + 0.095 * losses.structural(x_hat, x, autoencoder.mask)
        if setting.loss.beta != 1.0:
            with torch.no_grad():
                target = run(both)
            total = total + 0.855 * losses.behavioral(run(representation.weights(x_hat)), target, losses.probabilities)
        total.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one warm-up; the median is printed")
    parser.add_argument("--small", action="store_true", help="the size of the digits preset instead (CNN8)")
    parser.add_argument("--options", action="store_true", help="also with pretrain.precision and pretrain.compile")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = Architecture("CNN8" if arguments.small else "CNN3")
    config, count, query_count = (SMALL, 32, 128) if arguments.small else (PUBLISHED, 16, 256)
    checkpoints = checkpoints_of(architecture, count)
    queries = torch.randn(query_count, *architecture.build().input_shape, device=device)
    weights = checkpoints.to(device).weights
    steps = {}
    for name, make in (("ours", ours), ("published", published)):
        for kind, beta in (("behavior", 0.1), ("structure", 1.0)):
            loss = replace(LossConfig(), beta=beta)
            steps[name, kind] = make(setting_of(checkpoints, config, loss, query_count, device), weights, queries)
    for kind in ("bfloat16", "compiled") if arguments.options else ():
        setting = setting_of(checkpoints, config, LossConfig(), query_count, device)
        core = setting.representation.autoencoder.core
        core.reduced = kind == "bfloat16"
        if kind == "compiled":
            core.compile_blocks(device)
        steps["ours", kind] = ours(setting, weights, queries)
    rounds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(arguments.rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds[key].append(time.perf_counter() - start)
    median = {key: statistics.median(values[1:]) for key, values in rounds.items()}
    for (name, kind), seconds in median.items():
        print(f"{name:<10}{kind:<10}{seconds:8.3f} s per step")
    for kind in ("bfloat16", "compiled") if arguments.options else ():
        print(f"ratio step_over_{kind} {median['ours', 'behavior'] / median['ours', kind]:.2f}")
    print(f"ratio step_published_over_ours {median['published', 'behavior'] / median['ours', 'behavior']:.2f}")
    print(f"ratio step_behavior_over_structure {median['ours', 'behavior'] / median['ours', 'structure']:.2f}")


if __name__ == "__main__":
    main()
