"""Experts from a base: fine-tuning on a task's training split."""
