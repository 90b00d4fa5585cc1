"""The embedded world: tiny base models, fine-tuning datasets and benchmarks, built on the spot, no network.

Importing it is cheap: PyTorch and transformers are imported where a model is built.
"""

from sweep.tiny.base_models import BASE_MODELS, BaseRecipe
from sweep.tiny.benchmarks import BENCHMARKS, BenchmarkRecipe
from sweep.tiny.build import (
    build_all,
    build_base_model,
    build_benchmark,
    build_dataset,
    default_cache_dir,
    recipe_id,
)
from sweep.tiny.datasets import DATASETS, DatasetRecipe

__all__ = [
    "BASE_MODELS",
    "BENCHMARKS",
    "DATASETS",
    "BaseRecipe",
    "BenchmarkRecipe",
    "DatasetRecipe",
    "build_all",
    "build_base_model",
    "build_benchmark",
    "build_dataset",
    "default_cache_dir",
    "recipe_id",
]
