"""What is configured: params.yaml, profiles and studies over it, and the graph of dvc.yaml."""
