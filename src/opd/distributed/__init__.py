"""The same parts on more than one machine: Ray places and supervises them, vLLM samples, FSDP2 shards the update
(docs/distributed.md)."""
