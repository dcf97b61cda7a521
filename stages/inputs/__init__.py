"""What several stages read: datasets, published weights, segmenters."""
