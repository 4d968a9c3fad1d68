"""Sampler, teachers and learner in one process, on Hugging Face transformers and torch."""
