"""On top: what runs the stages. CLI and commands, flow, launchers, worktrees."""
