"""Segmentation recipes: models, data, metrics, and the training loop of `train` and `demo`."""
