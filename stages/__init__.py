"""One module per DVC stage: reads parameters and inputs, calls data and models, publishes outs."""
