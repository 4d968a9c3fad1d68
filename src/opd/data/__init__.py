"""Packing rollouts for the model, and the order in which prompts are visited."""
