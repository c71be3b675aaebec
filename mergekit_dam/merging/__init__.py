"""The merge equation and its gradients, on the CPU and in Triton."""
