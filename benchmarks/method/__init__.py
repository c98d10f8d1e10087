"""The value of pruning: the same trainings dense, pruned in several ways, and narrow from the start."""
