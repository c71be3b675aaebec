"""Define suites: sets of models, data and attacks."""
