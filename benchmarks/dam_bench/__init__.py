"""Builds what a benchmark needs: tasks, theta_0, fine-tuned models and victims. The defence knows nothing of it."""
