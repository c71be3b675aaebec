"""Train clean models and victims."""
