"""Networks with a property of their own: denoisers of observations, 1-Lipschitz layers and extractors, activations of known curvature."""

from robustrl.networks.activations import Activation, LeakyReLU, SmoothActivation, activation, from_curvature
from robustrl.networks.denoisers import Denoiser, DnCNN, ResidualMLP, denoiser_for, load_denoiser
from robustrl.networks.extractors import LipschitzCNN, LipschitzMLP
from robustrl.networks.skew_orthogonal import Householder, MaxMin, OrthogonalLinear, SkewOrthogonalConv2d

__all__ = [
    "Activation",
    "Denoiser",
    "DnCNN",
    "Householder",
    "LeakyReLU",
    "LipschitzCNN",
    "LipschitzMLP",
    "MaxMin",
    "OrthogonalLinear",
    "ResidualMLP",
    "SkewOrthogonalConv2d",
    "SmoothActivation",
    "activation",
    "denoiser_for",
    "from_curvature",
    "load_denoiser",
]
