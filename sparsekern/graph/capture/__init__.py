"""Capture: exports a module as a program of ATen ops on fake tensors, without the user's hooks."""
