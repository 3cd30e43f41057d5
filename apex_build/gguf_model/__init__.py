"""Read model and imatrix files: tensors, roles, draft head. Nothing here needs a build."""
