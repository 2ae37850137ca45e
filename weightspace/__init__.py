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
        ReconstructConfig,
        RefineConfig,
        ZooConfig,
    )
    from weightspace.downstream.distances import cka, model_distances
    from weightspace.downstream.finetune import finetune
    from weightspace.downstream.generate import generate, load_network, load_networks
    from weightspace.downstream.metrics import ensemble
    from weightspace.downstream.probe import probe
    from weightspace.downstream.reconstruct import reconstruct
    from weightspace.downstream.samplers import (
        SAMPLERS,
        bootstrapped,
        flow,
        gaussian,
        kde,
        kde_token,
        kde_value,
        subsampled,
    )
    from weightspace.experiment import run
    from weightspace.hyperrep.pretrain import pretrain
    from weightspace.hyperrep.refine import refined
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
    from weightspace.zoo.spectrum import spectrum_study

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
    "SAMPLERS": "downstream.samplers",
    "SCALES": "config",
    "PretrainConfig": "config",
    "ProbeConfig": "config",
    "ReconstructConfig": "config",
    "RefineConfig": "config",
    "TokenBatch": "tokens.tokenizer",
    "Tokenizer": "tokens.tokenizer",
    "ZooConfig": "config",
    "align": "networks.symmetry",
    "bootstrapped": "downstream.samplers",
    "cka": "downstream.distances",
    "ensemble": "downstream.metrics",
    "export_zoo": "zoo.exporting",
    "finetune": "downstream.finetune",
    "flow": "downstream.samplers",
    "gaussian": "downstream.samplers",
    "generate": "downstream.generate",
    "groups_of": "networks.symmetry",
    "import_zoo": "zoo.importing",
    "kde": "downstream.samplers",
    "kde_token": "downstream.samplers",
    "kde_value": "downstream.samplers",
    "load_network": "downstream.generate",
    "load_networks": "downstream.generate",
    "load_task": "tasks.images",
    "make_report": "report.page",
    "model_distances": "downstream.distances",
    "outputs": "networks.behavior",
    "pretrain": "hyperrep.pretrain",
    "probe": "downstream.probe",
    "register_layer": "networks.layers",
    "register_network": "networks.architectures",
    "reconstruct": "downstream.reconstruct",
    "refined": "hyperrep.refine",
    "run": "experiment",
    "run_study": "studies",
    "spectrum_study": "zoo.spectrum",
    "subsampled": "downstream.samplers",
    "train_population": "zoo.population",
}

__all__ = [
    "PRESETS",
    "SAMPLERS",
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
    "ReconstructConfig",
    "RefineConfig",
    "TokenBatch",
    "Tokenizer",
    "ZooConfig",
    "align",
    "bootstrapped",
    "cka",
    "ensemble",
    "export_zoo",
    "finetune",
    "flow",
    "gaussian",
    "generate",
    "groups_of",
    "import_zoo",
    "kde",
    "kde_token",
    "kde_value",
    "load_network",
    "load_networks",
    "load_task",
    "make_report",
    "model_distances",
    "outputs",
    "pretrain",
    "probe",
    "reconstruct",
    "refined",
    "register_layer",
    "register_network",
    "run",
    "run_study",
    "spectrum_study",
    "subsampled",
    "train_population",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``weightspace --help`` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"weightspace.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'weightspace' has no attribute {name!r}")
