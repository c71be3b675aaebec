"""Tables and figures from the result files."""
