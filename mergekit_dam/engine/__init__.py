"""Weights in memory, and processes: the merged model, sharding, snapshots, and worker processes."""
