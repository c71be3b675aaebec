"""Run methods on scenarios, one JSON per run."""
