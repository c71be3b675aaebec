"""What mergekit calls: the merge method, its planner's config, its output."""
