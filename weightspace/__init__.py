"""Trained neural networks as data: model zoos, hyper-representations, and the behavioral loss."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightspace.config import (
        PRESETS,
        SCALES,
        AutoencoderConfig,
        Experiment,
        FinetuneConfig,
        GenerateConfig,
        ImportConfig,
        LossConfig,
        PretrainConfig,
        ProbeConfig,
        ZooConfig,
    )
    from weightspace.downstream.finetune import finetune
    from weightspace.downstream.generate import generate, load_network, load_networks
    from weightspace.downstream.probe import probe
    from weightspace.downstream.reconstruct import reconstruct
    from weightspace.downstream.samplers import flow, kde
    from weightspace.experiment import run
    from weightspace.hyperrep.pretrain import pretrain
    from weightspace.hyperrep.representation import Embeddings, HyperRepresentation
    from weightspace.networks.architectures import Architecture, register_network
    from weightspace.networks.behavior import Outputs, outputs
    from weightspace.networks.checkpoints import Checkpoints
    from weightspace.networks.layers import register_layer
    from weightspace.networks.symmetry import align, groups_of
    from weightspace.report.page import make_report
    from weightspace.studies import run_study
    from weightspace.tasks.images import ImageTask, load_task
    from weightspace.tokens.tokenizer import TokenBatch, Tokenizer
    from weightspace.zoo.exporting import export_zoo
    from weightspace.zoo.importing import import_zoo
    from weightspace.zoo.model_zoo import ModelZoo
    from weightspace.zoo.population import train_population

_HOMES = {
    "Architecture": "networks.architectures",
    "AutoencoderConfig": "config",
    "Checkpoints": "networks.checkpoints",
    "Embeddings": "hyperrep.representation",
    "Experiment": "config",
    "FinetuneConfig": "config",
    "GenerateConfig": "config",
    "HyperRepresentation": "hyperrep.representation",
    "ImageTask": "tasks.images",
    "ImportConfig": "config",
    "LossConfig": "config",
    "ModelZoo": "zoo.model_zoo",
    "Outputs": "networks.behavior",
    "PRESETS": "config",
    "SCALES": "config",
    "PretrainConfig": "config",
    "ProbeConfig": "config",
    "TokenBatch": "tokens.tokenizer",
    "Tokenizer": "tokens.tokenizer",
    "ZooConfig": "config",
    "align": "networks.symmetry",
    "export_zoo": "zoo.exporting",
    "finetune": "downstream.finetune",
    "flow": "downstream.samplers",
    "generate": "downstream.generate",
    "groups_of": "networks.symmetry",
    "import_zoo": "zoo.importing",
    "kde": "downstream.samplers",
    "load_network": "downstream.generate",
    "load_networks": "downstream.generate",
    "load_task": "tasks.images",
    "make_report": "report.page",
    "outputs": "networks.behavior",
    "pretrain": "hyperrep.pretrain",
    "probe": "downstream.probe",
    "register_layer": "networks.layers",
    "register_network": "networks.architectures",
    "reconstruct": "downstream.reconstruct",
    "run": "experiment",
    "run_study": "studies",
    "train_population": "zoo.population",
}

__all__ = [
    "PRESETS",
    "SCALES",
    "Architecture",
    "AutoencoderConfig",
    "Checkpoints",
    "Embeddings",
    "Experiment",
    "FinetuneConfig",
    "GenerateConfig",
    "HyperRepresentation",
    "ImageTask",
    "ImportConfig",
    "LossConfig",
    "ModelZoo",
    "Outputs",
    "PretrainConfig",
    "ProbeConfig",
    "TokenBatch",
    "Tokenizer",
    "ZooConfig",
    "align",
    "export_zoo",
    "finetune",
    "flow",
    "generate",
    "groups_of",
    "import_zoo",
    "kde",
    "load_network",
    "load_networks",
    "load_task",
    "make_report",
    "outputs",
    "pretrain",
    "probe",
    "reconstruct",
    "register_layer",
    "register_network",
    "run",
    "run_study",
    "train_population",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``weightspace --help`` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"weightspace.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'weightspace' has no attribute {name!r}")
