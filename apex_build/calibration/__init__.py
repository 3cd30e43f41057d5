"""From a calibration set to an imatrix: documents, the text they make with the model's chat template, and llama-imatrix
over it.
"""
