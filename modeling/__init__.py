"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239) for small images."""
