"""Measure step time, memory and merge throughput, as ratios within one run."""
