"""What came out: the report, and runs in MLflow."""
