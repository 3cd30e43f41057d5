"""From a calibration set to an imatrix: documents, their text in the model's chat template, and llama-imatrix over
it.
"""
