"""The theory as a program: tabular policies on small trees, where every mean and variance is a finite sum."""
