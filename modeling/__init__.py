"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239) for small images."""

IMAGE_CHANNELS, IMAGE_SIZE = 3, 32  # of every data set here, height and width
