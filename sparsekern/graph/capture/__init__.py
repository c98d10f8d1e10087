"""From a module to a program of ATen ops: export on fake tensors, without the user's hooks."""
