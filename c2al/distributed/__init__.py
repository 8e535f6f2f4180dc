"""Process group, sharding, optimizers and checkpoints: everything that knows torchrec runs on many ranks."""
