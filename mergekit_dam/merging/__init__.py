"""Compute the merge equation and its gradients, on the CPU and in Triton."""
