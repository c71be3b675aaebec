"""The attacks of the benchmark: attackers by name, for every suite."""
