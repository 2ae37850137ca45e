"""Aligning many checkpoints to a reference at once against one after another.

python benchmarks/alignment.py [--network CNN8] [--checkpoints 256] [--rounds 3] [--by activations]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from weightspace.networks.architectures import Architecture
from weightspace.networks.behavior import input_shape_of
from weightspace.networks.symmetry import align, align_features, features, groups_of, permute, random_permutations
from weightspace.zoo.aligning import IMAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="CNN8", help="base network")
    parser.add_argument("--checkpoints", type=int, default=256, help="checkpoints to align")
    parser.add_argument("--by", choices=("weights", "activations"), default="weights", help="what is matched")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median ratio is printed")
    arguments = parser.parse_args()
    architecture, count = Architecture(arguments.network), arguments.checkpoints
    groups, generator = groups_of(architecture), torch.Generator().manual_seed(0)
    reference = {name: torch.randn(1, *shape, generator=generator) for name, shape in architecture.shapes.items()}
    near = {name: w + 0.3 * torch.randn(count, *w.shape[1:], generator=generator) for name, w in reference.items()}
    weights = permute(near, groups, random_permutations(groups, count, generator))
    inputs = torch.randn(IMAGES, *input_shape_of(architecture.build()), generator=generator)
    theirs = features(architecture, reference, inputs, groups)

    def aligned(some: dict[str, Tensor]) -> dict[str, Tensor]:
        if arguments.by == "weights":
            return align(some, reference, groups)
        return permute(some, groups, align_features(features(architecture, some, inputs, groups), theirs))

    ratios, seconds = [], []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        together = aligned(weights)
        middle = time.perf_counter()
        alone = [aligned({name: w[row : row + 1] for name, w in weights.items()}) for row in range(count)]
        end = time.perf_counter()
        for name, weight in together.items():
            assert torch.allclose(weight, torch.cat([each[name] for each in alone]))
        seconds.append((middle - start, end - middle))
        ratios.append((end - middle) / (middle - start))
    batched, single = (1e3 * statistics.median(values) / count for values in zip(*seconds, strict=True))
    print(f"together {batched:.3f}, one after another {single:.3f} ms per checkpoint")
    print(f"ratio alignment_{architecture.name}_by_{arguments.by} {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
