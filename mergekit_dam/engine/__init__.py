"""Several processes, and runs that are cut short: sharding, snapshots, and the start of worker processes."""
