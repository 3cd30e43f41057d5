"""Run the built llama.cpp tools as child processes, parse their output, and ask libggml about its types."""
