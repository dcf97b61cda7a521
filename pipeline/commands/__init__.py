"""Commands that need more than the control plane, imported when they are called."""
