"""Tensors and rows: the ops, their checks and their backends. Knows no model and no channel."""
