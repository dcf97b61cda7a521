"""What runs the stages: CLI, parameters, graph, flow, launchers, trainer, tracking, report."""
