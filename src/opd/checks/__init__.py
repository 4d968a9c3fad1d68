"""Pre-flight checks: nothing is trained on wrong numbers."""
