"""Checkpoints, the plan of a merge, and the architectures that mergekit lacks."""
