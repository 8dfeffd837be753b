"""Tasks: what a batch's outputs are worth. One module per task, siblings of `causal_lm`."""
