"""How good a file is: evaluators of plugins, run one after the other, their figures with intervals, recorded."""
