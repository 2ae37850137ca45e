"""Base networks with residual connections and normalization: ResNet-18, a vision transformer, an MLP-Mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.networks.activations import Activation, activation_named


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization, beside the identity or a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (arXiv 1512.03385) with the stem for small images (3x3, no pooling); 11.2 M parameters at width 64."""

    def __init__(
        self, channels: int = 3, classes: int = 10, size: int = 32, width: int = 64, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages = []
        for stage in range(4):
            outputs, inputs = width * 2**stage, width * 2 ** max(stage - 1, 0)
            first = BasicBlock(inputs, outputs, 2 if stage else 1, self.activation)
            stages.append(nn.Sequential(first, BasicBlock(outputs, outputs, 1, self.activation)))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(8 * width, classes)
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.activation(self.bn(self.conv(x))))  # [B, 8 * width, size / 8, size / 8]
        return self.fc(x.mean((2, 3)))  # [B, classes]


class TransformerBlock(nn.Module):
    """Pre-norm attention and a two-layer perceptron, each beside the identity."""

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]  # [B, patches, width]
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer (arXiv 2010.11929) on patches, averaged before the classifier."""

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        size: int = 32,
        patch: int = 4,
        width: int = 48,
        depth: int = 4,
        heads: int = 4,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        act = activation_named(activation)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, act) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # [B, patches, width]
        return self.fc(self.norm(self.blocks(x)).mean(1))  # [B, classes]


class MixerBlock(nn.Module):
    """A perceptron over patches, then one over channels, each beside the identity."""

    def __init__(self, patches: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.patches1 = nn.Linear(patches, patches)
        self.patches2 = nn.Linear(patches, patches)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches1(self.norm1(x).transpose(1, 2))  # [B, width, patches]
        x = x + self.patches2(self.activation(h)).transpose(1, 2)  # [B, patches, width]
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class MLPMixer(nn.Module):
    """An MLP-Mixer (arXiv 2105.01601) on patches."""

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        size: int = 32,
        patch: int = 4,
        width: int = 48,
        depth: int = 4,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        act = activation_named(activation)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((size // patch) ** 2, width, act) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [B, patches, width]
        return self.fc(self.norm(self.blocks(x)).mean(1))  # [B, classes]
