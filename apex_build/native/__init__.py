"""Running the built llama.cpp tools as child processes, reading what they print, and asking libggml about its types."""
