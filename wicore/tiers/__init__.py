"""The KV cache's tiers below host memory: blocks in files, verified whenever they are read."""
