"""Suites: models, data and attacks that belong together."""
