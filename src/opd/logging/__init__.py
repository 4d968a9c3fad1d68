"""The run folder, the progress line, the curves and the writers."""
