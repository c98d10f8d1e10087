"""What happens while a Pruner watches a training: steps, events, and what they report."""
