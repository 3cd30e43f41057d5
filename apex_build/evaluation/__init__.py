"""Measure files: run the plugins' evaluators one after the other, and record their figures with intervals."""
