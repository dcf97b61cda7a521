"""How much each loss pulls at the weights: a term acts through its gradient, not through its weight or its value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from base.watching import DISTILLED


def gradient_norms(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """The norm of each loss's gradient at the parameters, by its name.

    The graph stays as it is, and so do the parameters' `grad`: a training that looks goes the same way as one that
    does not.

    Args:
        losses: scalars; one that no parameter takes part in has norm 0.
        parameters: those that train.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {name: _norm(loss, trained) for name, loss in losses.items()}


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    if not loss.requires_grad:
        return loss.new_zeros(())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.norm() for gradient in found if gradient is not None]
    return torch.stack(norms).norm() if norms else loss.new_zeros(())


def pulls(losses: Mapping[str, Tensor], student: nn.Module) -> dict[str, float]:
    """Curves of how the losses of a batch pull at a student's weights.

    `gradient/<loss>` is the norm of each gradient; `pull/<term>` that of a distillation term over that of all losses
    against the truth together, where there is such a loss.
    """
    truth = [loss for name, loss in losses.items() if not name.startswith(DISTILLED)]
    whole = {"": torch.stack(truth).sum()} if truth else {}
    norms = gradient_norms({**losses, **whole}, student.parameters())
    values = dict(zip(norms, torch.stack([*norms.values()]).tolist(), strict=True))
    reference = values.pop("", 0.0)
    found = {f"gradient/{name}": value for name, value in values.items()}
    terms = [name for name in values if name.startswith(DISTILLED)] if reference > 0 else []
    return found | {f"pull/{name.removeprefix(DISTILLED)}": values[name] / reference for name in terms}
