"""Run the benchmark: build tasks, theta_0, fine-tunes and victims, merge and measure. The defence never imports it."""
