"""Rewards of episodes: verifiers, reward functions and format checks."""
