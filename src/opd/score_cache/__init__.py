"""A cache of teachers' scores, in memory and on disk, so that no teacher scores the same response twice."""
