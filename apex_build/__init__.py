"""Calibrate and quantize mixture-of-experts GGUF models with their MTP draft head, on a patched llama.cpp."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("apex-build")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
