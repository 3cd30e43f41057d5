"""How good a file is: so far, the share of its drafted tokens that the trunk accepts."""
