"""Networks of our own: denoisers of observations."""

from robustrl.networks.denoisers import Denoiser, DnCNN, ResidualMLP, denoiser_for, load_denoiser

__all__ = ["Denoiser", "DnCNN", "ResidualMLP", "denoiser_for", "load_denoiser"]
