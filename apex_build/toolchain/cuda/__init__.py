"""CUDA: the toolkit, from this machine or the package index, and builds with it."""
