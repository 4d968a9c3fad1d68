"""The backend on a Ray cluster: Ray places the parts, vLLM samples, FSDP2 shards the update (docs/concepts/distributed.md)."""
