"""The head: its weights, its targets, its maps."""
