"""Run `dam` as a merge method of mergekit: settings from its planner, masks per tensor, its output directory."""
