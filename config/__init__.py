"""What is configured: the parameters, profiles and studies over them, and the graph of dvc.yaml."""
