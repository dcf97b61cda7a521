"""Import what the pipeline stands on, run one sparse convolution, and fail with what to do when a part is missing."""

from __future__ import annotations

import importlib
import sys
import warnings

from machine import for_cuda
from sparse_convolution import for_this_machine

MODULES = [
    "torch",
    "mmcv.ops",
    "mmdet.models",
    "mmdet3d.models",
    "nuscenes.nuscenes",
    "lightning_fabric",
    "dvc.repo",
    "prefect.server.api.server",
    "mlflow",
    "pyarrow",
    "embreex",
    "spconv.pytorch",
]


def check_imports() -> None:
    """Import every module of the stack; name the first that fails."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            sys.exit(
                f"setup: `import {name}` failed: {error}\nsetup: remove the .venv folder and run `make setup` again"
            )


def check_sparse_convolution() -> None:
    """Compare a sparse convolution and its gradients with the dense one's, on the GPU if torch sees one."""
    import torch

    if for_cuda() and not torch.cuda.is_available():
        print("setup: no GPU here, so the sparse convolution for one was imported, but not run")
        return
    try:
        _compare_with_dense("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:
        sys.exit(
            f"setup: the sparse convolution does not work on this machine: {error}\n"
            f"setup: {' '.join(for_this_machine())} should: run `python setup/sparse_convolution.py` in the "
            "environment, and setup/check.py again"
        )


def _compare_with_dense(device: str) -> None:
    import torch
    import torch.nn.functional as F
    from spconv.pytorch import SparseConv3d, SparseConvTensor, ops

    if device == "cpu":
        ops.get_current_stream = lambda: 0  # see models/layers/sparse_convolution.py, whose package need not be here
    # spconv's CPU kernel that adds results up is wrong with several threads (spconv 2.3.8).
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = [5, 6, 7]  # unequal, so that mixed-up axes show
    cells = (torch.rand(2, *shape) < 0.3).nonzero().contiguous()  # spconv takes them for contiguous
    features = torch.randn(len(cells), 4, requires_grad=True)
    layer = SparseConv3d(4, 8, 3, stride=2, padding=1, bias=False).to(device)
    sparse = SparseConvTensor(features.to(device), cells.int().to(device), shape, batch_size=2)

    # In double precision on the CPU, since a GPU's dense convolution may round to TF32.
    kernel = layer.weight.detach().cpu().double().requires_grad_()
    inputs = features.detach().double().requires_grad_()
    grid = inputs.new_zeros(2, *shape, 4).index_put(tuple(cells.T), inputs).movedim(-1, 1)
    expected = F.conv3d(grid, kernel.movedim(-1, 1), stride=2, padding=1)
    found = layer(sparse).dense()
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.cpu(), expected, **close)
    slope = torch.randn(expected.shape)
    gradients = torch.autograd.grad(found, [features, layer.weight], slope.to(device))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, [inputs, kernel], slope.double()), strict=True):
        torch.testing.assert_close(gradient.cpu(), exact, **close)


def main() -> None:
    """Check everything; the first fault ends the process."""
    warnings.simplefilter("ignore")
    check_imports()
    check_sparse_convolution()


if __name__ == "__main__":
    main()
