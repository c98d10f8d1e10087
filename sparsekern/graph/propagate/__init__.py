"""From a program to slots: one rule per ATen op says which indices go together."""
