"""One module per DVC stage: reads parameters and inputs, calls the other rooms, publishes outs."""
