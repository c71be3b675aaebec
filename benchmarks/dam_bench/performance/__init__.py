"""Step time, memory and merge throughput, as ratios within one run."""
