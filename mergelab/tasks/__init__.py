"""What is measured: task specs, data, labels, splits, prompts."""
