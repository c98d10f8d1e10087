"""State between steps: statistics of rows, masks, and the network that they belong to."""
