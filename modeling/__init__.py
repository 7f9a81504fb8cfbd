"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239) for small images."""

IMAGE_CHANNELS, IMAGE_SIZE = 3, 32  # of CIFAR-10, and of a data set whose configuration says nothing else
IMAGE_SHAPE = IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE
