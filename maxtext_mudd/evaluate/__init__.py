"""The command that evaluates a model on tasks of EleutherAI's lm-evaluation-harness, and on texts."""
