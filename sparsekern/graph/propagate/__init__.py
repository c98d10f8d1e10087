"""Propagation of slots through a program: one rule per ATen op says which indices go together."""
