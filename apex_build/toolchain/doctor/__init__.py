"""What `apex doctor` tells: the machine, and which builds are feasible on it."""
