"""Evaluates a checkpoint on tasks of EleutherAI's lm-evaluation-harness, and on texts."""
