"""Publish a merge: write its report page and model card, and push it to the Hub."""
