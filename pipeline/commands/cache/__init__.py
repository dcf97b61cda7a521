"""`python -m pipeline cache`: what stores will cost, whether they are whole, what can go, what is in them.

Each module has one command as `run(root, ...)`, which prints and returns an exit code. Nothing here changes a result,
so no stage of dvc.yaml depends on it.
"""
