"""Models behind servers: teachers by URL, and the engines that sample (docs/concepts/distributed.md)."""
