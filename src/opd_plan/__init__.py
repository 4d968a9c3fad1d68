"""What a recipe would need of a cluster that is not at hand: placement, memory and time, reckoned and never measured."""
