"""For `apex doctor`: the machine, and which builds are feasible on it."""
