"""The training loop, on which teachers and students are trained."""
