"""Read checkpoints, plan a merge, and define the architectures that mergekit lacks."""
