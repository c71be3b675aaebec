"""Fit the masks: objectives, searches, the run with its journal."""
