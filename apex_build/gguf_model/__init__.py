"""Reading model and imatrix files: their tensors, roles and draft head. Nothing here writes, and nothing here needs a
build.
"""
