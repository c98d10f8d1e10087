"""What is saved and loaded: checkpoints and state dicts of a Pruner."""
