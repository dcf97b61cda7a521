"""Official metrics, and what is counted beside them."""
