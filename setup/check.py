"""Import what the pipeline stands on, and fail with what to do when a part is missing."""

from __future__ import annotations

import importlib
import sys
import warnings

MODULES = ["torch", "mmcv.ops", "mmdet.models", "mmdet3d.models", "nuscenes.nuscenes", "lightning_fabric", "dvc.repo",
           "prefect.server.api.server", "mlflow", "pyarrow", "embreex"]


def main() -> None:
    """Import every module of the stack; name the first that fails."""
    warnings.simplefilter("ignore")
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            sys.exit(f"setup: `import {name}` failed: {error}\n"
                     f"setup: remove the .venv folder and run `make setup` again")


if __name__ == "__main__":
    main()
