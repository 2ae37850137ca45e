"""Scoring many checkpoints on one batch of images: our measured strategy against one forward pass after another.

python benchmarks/scoring.py [--network CNN8|CNN3] [--checkpoints 256] [--images 450] [--rounds 5] [--device auto]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from pretrain_step import checkpoints_of

from weightspace.experiment import choose_device
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="CNN8", help="CNN8 or CNN3")
    parser.add_argument("--checkpoints", type=int, default=256, help="checkpoints to score")
    parser.add_argument("--images", type=int, default=450, help="images each is scored on")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one warm-up; the median is printed")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda ...")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    architecture = Architecture(arguments.network)
    checkpoints = checkpoints_of(architecture, arguments.checkpoints)
    images = torch.randn(arguments.images, *architecture.build().input_shape, device=device)
    networks = [checkpoints.network(row).to(device) for row in range(len(checkpoints))]

    @torch.no_grad()
    def one_by_one() -> torch.Tensor:
        return torch.stack([network(images) for network in networks]).cpu()

    def ours() -> torch.Tensor:
        return behavior.outputs(checkpoints, images).logits.cpu()

    torch.testing.assert_close(ours(), one_by_one(), rtol=1e-3, atol=1e-3)
    seconds: list[tuple[float, float]] = []
    for _ in range(arguments.rounds):
        pair = []
        for way in (one_by_one, ours):
            start = time.perf_counter()
            way()
            pair.append(time.perf_counter() - start)
        seconds.append((pair[0], pair[1]))
    for name, values in zip(("one by one", "ours"), zip(*seconds, strict=True), strict=True):
        print(f"{name:<12}{statistics.median(values) / len(checkpoints) * 1e3:8.3f} ms per checkpoint")
    print(f"ratio scoring_{arguments.network} {statistics.median(one / mine for one, mine in seconds):.2f}")


if __name__ == "__main__":
    main()
