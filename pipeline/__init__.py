"""What runs the stages: CLI, parameters, graph, flow, launchers, tracking, report."""
