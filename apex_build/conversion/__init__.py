"""From a Hugging Face folder to a GGUF model with its draft head, with the pinned source's converter."""
