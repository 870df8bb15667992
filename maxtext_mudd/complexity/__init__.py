"""What a model costs: exact counts, and the formulas of the paper."""
