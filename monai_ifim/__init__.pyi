from . import (
    data,
    fisher,
    handlers,
    likelihoods,
    model,
    perturbation,
    results,
    statistics,
    training,
    transforms,
    visualize,
)
from .archive import Archive
from .fisher import ContrastDirections, InputFisher, Lanczos, contrast_directions, input_fisher
from .likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    PooledSigmoid,
    PooledSoftmax,
    VoxelwiseSigmoid,
    VoxelwiseSoftmax,
)
from .model import Model, PerImage, Windowed
from .perturbation import SensitivityCurves, sensitivity_curves

__all__ = [
    "Archive",
    "Bernoulli",
    "Categorical",
    "ContrastDirections",
    "Gaussian",
    "InputFisher",
    "Lanczos",
    "Model",
    "PerImage",
    "PooledSigmoid",
    "PooledSoftmax",
    "SensitivityCurves",
    "VoxelwiseSigmoid",
    "VoxelwiseSoftmax",
    "Windowed",
    "contrast_directions",
    "data",
    "fisher",
    "handlers",
    "input_fisher",
    "likelihoods",
    "model",
    "perturbation",
    "results",
    "sensitivity_curves",
    "statistics",
    "training",
    "transforms",
    "visualize",
]
__version__: str
