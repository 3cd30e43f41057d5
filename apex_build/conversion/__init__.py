"""From a Hugging Face folder to a GGUF model with its draft head, by the pinned source's converter: between build and
calibrate.
"""
