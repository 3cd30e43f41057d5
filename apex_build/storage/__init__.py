"""Files and folders, whole or not at all: outputs, locks, digests."""
