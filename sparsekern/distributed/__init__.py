"""Several processes: sharded tensors, agreement between ranks, and rebuilding DistributedDataParallel."""
