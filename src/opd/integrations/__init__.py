"""Tasks and environments of other libraries."""
