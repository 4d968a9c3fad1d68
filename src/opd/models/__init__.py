"""Models: loading, adapters, packed passes, attention and the KV cache."""
