"""CUDA: the toolkit, from this machine or the package index, and what is built with it."""
