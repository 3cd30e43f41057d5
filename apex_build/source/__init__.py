"""The source of llama.cpp: pins, fetching, the tree as a git repository, and our patches on it."""
