"""Builds as files: packed here, imported elsewhere."""
