"""Train models, and poison some."""
