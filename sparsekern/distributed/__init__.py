"""Training in several processes: sharded tensors, agreement of ranks, rebuilding DistributedDataParallel."""
