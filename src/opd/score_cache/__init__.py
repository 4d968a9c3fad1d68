"""Scores that are kept, in memory and on disk, so that no teacher is asked twice about the same response."""
