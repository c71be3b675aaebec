"""Make tables and figures from the result files."""
