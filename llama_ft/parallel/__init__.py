"""One run on several processes, each with a GPU, by PyTorch's DistributedDataParallel or `fully_shard`."""
