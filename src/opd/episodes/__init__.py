"""Episodes: conversations with environments and tools, as rollouts."""
