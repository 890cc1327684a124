"""One run on several processes, each with a GPU: over PyTorch's DistributedDataParallel and `fully_shard`."""
