"""The ops over tensors and rows, their checks and their backends. This package knows no model."""
