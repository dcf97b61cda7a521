"""The training loop: one class on Lightning Fabric for every teacher and student.

Everything that a step depends on is either in the checkpoint (weights, optimiser, average, loss scaler, step number) or
a pure function of (seed, step, rank): the samples (`sampler`), the learning rate (`schedule`), all random draws
(`seeding`). A run that was killed and resumed therefore repeats the uninterrupted run bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from base.environment import cores
from base.errors import PipelineError
from base.progress import ProgressBar
from base.stopping import Preempted
from base.watching import WATCHED
from training.checkpoint import Checkpoint, CheckpointError, Checkpoints, replacing
from training.ema import EMA
from training.gradients import pulls
from training.loading import load_weights
from training.run import Run
from training.sampler import ClassBalance, KeyedDataset, Order, StepBatches, start_worker
from training.schedule import learning_rate
from training.seeding import STEP, make_deterministic, seed_everything

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from training.config import TrainConfig

logger = logging.getLogger(__name__)
RUNTIME = {"checkpoint_minutes", "workers", "log_every", "gradients_every"}  # settings that do not change the result
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # after which the ranks of a dead rank end too
BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")  # of CPUs whose arithmetic torch's convolutions use
SKIPS_IN_A_ROW = 20  # loss-scaler back-offs (a factor 2 each) before 16-mixed training counts as diverged


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """Everything with weights: the model, and train-only modules."""
        ...

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """Weighted loss terms (scalars, to be summed); `progress` is in [0, 1).

        Names that start with WATCHED are logged beside them and are no part of the loss. The same names every step.
        """
        ...

    @property
    def student(self) -> nn.Module:
        """The part of the module that is published, at whose weights gradients are compared."""
        ...


class NonFiniteError(PipelineError):
    """A loss or a gradient is NaN or infinite; names the step, the term and the samples."""


class _Opaque:
    """Carries a batch through Fabric's forward, which would cast its coordinates and calibration to bfloat16."""

    def __init__(self, content: Any) -> None:
        self.content = content


class _Loss(nn.Module):
    """The task as a module, so that DDP sees its forward."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self.loss = task.loss

    def forward(self, batch: _Opaque, progress: float) -> dict[str, Tensor]:
        return self.loss(batch.content, progress)


def train(
    task: Task,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    config: TrainConfig,
    run: Run,
    classes: Callable[[], Sequence[Iterable[int]]] | None = None,
    order: Order | None = None,
) -> dict[str, Tensor]:
    """Train to the end, from the newest checkpoint in `run.scratch` if there is one.

    Args:
        task: the module and its losses.
        dataset: read by `sampler.Key`; `collate` makes batches with `tokens`, `.to(device)` and, for GPUs,
            `.to(device, non_blocking=True)` and `.pin_memory()`.
        config: the settings; `batch_size` counts all processes together.
        run: seed, folder, curves, and whether to stop.
        classes: of the objects of each sample, by its index; asked for where `config.balanced`.
        order: which samples an epoch shows; None: all, or as `config.balanced` says.

    Returns:
        Averaged state (EMA) of `task.module` on the CPU; with `ema_decay` 0 the last one.

    Raises:
        Preempted: after `run.stop`.
        NonFiniteError: a loss or gradient is NaN or infinite.
        CheckpointError: the checkpoint in `run.scratch` belongs to another configuration or number of processes.
        PipelineError: `config.balanced` without `classes`.
    """
    order = class_balance(classes, run.label) if config.balanced else order
    return Trainer(task, dataset, collate, config, run, order).fit()


def class_balance(classes: Callable[[], Sequence[Iterable[int]]] | None, label: str) -> ClassBalance:
    """The resampling of `train.balanced`. Raises PipelineError where the samples have no classes."""
    if classes is None:
        raise PipelineError(
            f"{label}: train.balanced needs samples with classes, which these have not: set it to false"
        )
    return ClassBalance(classes())


def precision_here(precision: str) -> str:
    """The precision to compute in: float32 in place of a bfloat16 that this process's CPU would have to emulate.

    On a CPU without it (EPYC 7003, torch 2.13) a convolution of 64 channels took ten times as long as in float32.
    """
    emulated = not torch.cuda.is_available() and not any(map(torch.cpu.get_capabilities().get, BFLOAT16_UNITS))
    return "32-true" if precision == "bf16-mixed" and emulated else precision


def make_fabric(precision: Any) -> Fabric:
    """Fabric on this process's device: CUDA if there is one; the processes of torchrun if it started this one."""
    # Late: Fabric brings torch._dynamo, seconds of CPU time, and several stages read this module without training.
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    # Launchers start the processes themselves. The hint would be in every log of a machine that has Slurm.
    warnings.filterwarnings("ignore", "The `srun` command is available")
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Unused parameters are looked for because terms may start late; it also keeps DDP from regrouping its buckets
    # after the first step, which would make a resumed run sum gradients of three or more ranks in another order.
    strategy = DDPStrategy(find_unused_parameters=True, timeout=COLLECTIVE_TIMEOUT) if world > 1 else "auto"
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return Fabric(
        accelerator=accelerator, devices=local, num_nodes=world // local, strategy=strategy, precision=precision
    )


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_factors: Mapping[str, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels; none on biases, norms and other vectors.

    A module with the attribute `weight_decay = False` has none at all.

    Args:
        module: whose parameters are grouped; what is frozen is left out.
        weight_decay: of matrices and kernels.
        lr_factors: name of a submodule -> `factor` of its groups, by which the learning rate is multiplied; of several
            that hold a parameter the innermost counts.
    """
    free = {p for part in module.modules() if getattr(part, "weight_decay", True) is False for p in part.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = lr_factors.get(_innermost(name, lr_factors), 1.0)
            groups.setdefault((factor, parameter.ndim > 1 and parameter not in free), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "factor": factor}
        for (factor, decays), parameters in groups.items()
    ]


def freeze(module: nn.Module, lr_factors: Mapping[str, float]) -> None:
    """Take the submodules with factor 0 out of training; statistics of batch norms go on following the data.

    Raises:
        PipelineError: a name is no submodule.
    """
    for name, factor in lr_factors.items():
        try:
            part = module.get_submodule(name)
        except AttributeError:
            known = ", ".join(key for key, _ in module.named_modules() if key.count(".") <= name.count(".") and key)
            raise PipelineError(f"train.lr_factors: the model has no module {name!r}; it has {known}") from None
        part.requires_grad_(factor > 0)


def _innermost(name: str, modules: Iterable[str]) -> str:
    """The longest of the modules' names that holds a parameter's; empty if none does."""
    return max((module for module in modules if name.startswith(f"{module}.")), key=len, default="")


def minimised(names: Iterable[str]) -> list[str]:
    """Of the names that a task's loss returns those that are summed into the loss."""
    return [name for name in names if not name.startswith(WATCHED)]


class CopiedAhead(Iterator[Any]):
    """Batches on a GPU, each copied on a stream of its own while the step before it computes.

    The copies overlap with the computation if the batches are in pinned memory.

    Args:
        batches: on the host, with `.to(device, non_blocking=True)`.
        device: the GPU.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device)
        self.ahead = self._copy()

    def __next__(self) -> Any:
        if self.ahead is None:
            raise StopIteration
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        batch, self.ahead = self.ahead, self._copy()
        return batch

    def _copy(self) -> Any:
        """Start to copy the next batch; None at the end."""
        batch = next(self.batches, None)
        if batch is None:
            return None
        # The copy may be given the memory of an earlier batch. All that reads such a batch is in the queue by now, so
        # it waits for what is there; the step of the batch that is handed out next is not, and runs beside it.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            return batch.to(self.device, non_blocking=True)


class Trainer:
    """State and steps of one run; see `train`."""

    def __init__(
        self,
        task: Task,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        config: TrainConfig,
        run: Run,
        order: Order | None = None,
    ) -> None:
        make_deterministic()
        precision = precision_here(config.precision)
        if precision != config.precision:
            logger.info("%s trains in float32: this CPU would emulate bfloat16, which is slow", run.label)
        self.fabric = make_fabric(precision)
        self.fabric.launch()
        self.config, self.run = config, run
        self.dataset, self.collate, self.order = dataset, collate, order
        freeze(task.module, config.lr_factors)
        self.module = self.fabric.to_device(task.module).train()
        self.student = task.student
        self.pulls: dict[str, float] = {}  # of the last step that compared gradients, until they are logged
        self.loss, self.optimizer = self.fabric.setup(_Loss(task), self._make_optimizer())
        self.ema = EMA(self.module, config.ema_decay)
        self.checkpoints = Checkpoints(run.scratch / "checkpoints")
        self.step = 0
        self.skipped = 0  # 16-mixed: steps in a row that the loss scaler skipped
        batches = self._batches()
        self.total, self.samples_per_epoch = batches.total_steps, batches.length

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.module, self.config.weight_decay, self.config.lr_factors)
        return torch.optim.AdamW(groups, lr=self.config.lr, weight_decay=0.0)

    def fit(self) -> dict[str, Tensor]:
        """Resume, run the remaining steps, save the last state, return the averaged weights."""
        self._resume()
        main = self.fabric.is_global_zero
        saved = time.monotonic()
        with (
            Trace(self.run.scratch / "trace.jsonl", self.step, main) as trace,
            ProgressBar(self.run.label, self.total, self.step, main) as bar,
        ):
            batches = self._feed() if self.step < self.total else iter(())
            while self.step < self.total:
                metrics = self._one_step(batches)
                trace.write(self.step, metrics)
                self._report(bar, metrics)
                stopped, due = metrics["stop"] > 0, time.monotonic() - saved >= 60 * self.config.checkpoint_minutes
                if stopped or due or self.step == self.total:
                    trace.flush()
                    self._save()
                    saved = time.monotonic()
                if stopped and self.step < self.total:
                    raise Preempted(self.step)
        return {name: tensor.cpu() for name, tensor in self.ema.state.items()}

    def _one_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimiser step; returns its metrics, averaged over the ranks."""
        started = time.perf_counter()
        config = self.config
        rate = learning_rate(self.step, self.total, config.lr, config.warmup, config.schedule, config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        terms, tokens, waited = self._accumulate_gradients(batches)
        limit = config.grad_clip or math.inf
        norm = self.fabric.clip_gradients(self.loss, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        metrics = self._read(terms, norm, tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.module, self.step)
        return metrics | {"lr": rate, "data_wait_s": waited, "step_s": time.perf_counter() - started}

    def _accumulate_gradients(self, batches: Iterator[Any]) -> tuple[dict[str, Tensor], list[str], float]:
        """Forward and backward of the step's micro-batches; returns mean terms, sample tokens, seconds without data."""
        parts = self.config.accumulate
        sums: dict[str, Tensor] = {}
        tokens: list[str] = []
        waited = 0.0
        for part in range(parts):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            tokens += list(getattr(batch, "tokens", []))
            seed_everything(STEP, self.run.seed, self.step, part, self.fabric.global_rank)
            skip_sync = part < parts - 1 and self.fabric.world_size > 1
            with self.fabric.no_backward_sync(self.loss, enabled=skip_sync):
                terms = self.loss(_Opaque(batch), self.step / self.total)
                if part == 0 and self._compares_gradients():
                    self.pulls = pulls({name: terms[name] for name in minimised(terms)}, self.student)
                self.fabric.backward(torch.stack([terms[name] for name in minimised(terms)]).sum() / parts)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / parts
        return sums, tokens, waited

    def _compares_gradients(self) -> bool:
        return self.config.gradients_every > 0 and self.step % self.config.gradients_every == 0

    def _read(self, terms: dict[str, Tensor], norm: Tensor | None, tokens: list[str]) -> dict[str, float]:
        """Losses and gradient norm as numbers, in one transfer, checked before the weights are touched."""
        assert norm is not None
        names = [*terms, "grad_norm"]
        values = torch.stack([*terms.values(), norm.detach().float()])
        self._check_finite(dict(zip(names, values.tolist(), strict=True)), tokens)
        stop = torch.tensor([float(self.run.stop())], device=values.device)
        reduced = cast(Tensor, self.fabric.all_reduce(torch.cat([values, stop]), reduce_op="mean"))
        metrics = dict(zip([*names, "stop"], reduced.tolist(), strict=True))
        return {"loss": sum(metrics[name] for name in minimised(terms))} | metrics

    def _check_finite(self, values: dict[str, float], tokens: list[str]) -> None:
        wrong = [name for name in minimised(values) if not math.isfinite(values[name])]
        scaled = self.config.precision == "16-mixed"
        self.skipped = self.skipped + 1 if wrong == ["grad_norm"] and scaled else 0
        if not wrong or 0 < self.skipped <= SKIPS_IN_A_ROW:
            return
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        raise NonFiniteError(
            f"step {self.step}: {', '.join(f'{name} is {values[name]}' for name in wrong)}; "
            f"samples: {', '.join(tokens) or 'unnamed'}; first weights with such a gradient: "
            f"{', '.join(broken[:3]) or 'none'}. The weights are untouched; the last checkpoint is good"
        )

    def _report(self, bar: ProgressBar, metrics: dict[str, float]) -> None:
        rate = self.config.batch_size / metrics["step_s"]
        bar.advance(f"loss {metrics['loss']:.4g}  {rate:.1f} samples/s  waiting {metrics['data_wait_s']:.2f} s/step")
        if self.fabric.is_global_zero and (self.step % self.config.log_every == 0 or self.step == self.total):
            curves = {f"train/{name}": value for name, value in metrics.items() if name != "stop"}
            epoch = self.step * self.config.batch_size / self.samples_per_epoch
            self.run.tracker.log_metrics(curves | {"train/samples_per_s": rate, "epoch": epoch}, self.step)
        if self.pulls and self.fabric.is_global_zero:
            self.run.tracker.log_metrics(self.pulls, self.step)
            self.pulls = {}

    def _batches(self) -> StepBatches:
        return StepBatches(
            len(self.dataset),  # type: ignore[arg-type]
            self.config.batch_size,
            self.config.epochs,
            self.run.seed,
            first=self.step,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            accumulate=self.config.accumulate,
            order=self.order,
        )

    def _feed(self) -> Iterator[Any]:
        """The remaining batches on this process's device."""
        batches = iter(self._loader())
        if self.fabric.device.type == "cuda":
            return CopiedAhead(batches, self.fabric.device)
        return map(self.fabric.to_device, batches)

    def _loader(self) -> DataLoader[Any]:
        workers = self.config.workers
        if workers is None:  # without a GPU the model needs the cores itself
            cuda = self.fabric.device.type == "cuda"
            workers = max(1, min(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8)) if cuda else 1
        return DataLoader(
            KeyedDataset(self.dataset, self.run.seed),
            batch_sampler=self._batches(),
            collate_fn=self.collate,
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        settings = {k: v for k, v in self.config.model_dump().items() if k not in RUNTIME}
        return settings | {"seed": self.run.seed, "samples": len(self.dataset)}  # type: ignore[arg-type]

    def _save(self) -> None:
        """Write the state; a matter of rank 0, as the weights are equal on all ranks."""
        if not self.fabric.is_global_zero:
            return
        tensors = _prefixed("model", self.module.state_dict()) | _prefixed("ema", self.ema.state)
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= _prefixed(f"optimizer/{index}", state)
        self.checkpoints.save(
            self.step,
            tensors,
            {
                "identity": self._identity(),
                "world_size": self.fabric.world_size,
                "threads": torch.get_num_threads(),
                "scaler": self.fabric.strategy.precision.state_dict(),
                "skipped": self.skipped,
            },
        )

    def _resume(self) -> None:
        """Continue from the newest whole checkpoint; rank 0 says which."""
        newest = None
        if self.fabric.is_global_zero:
            self.checkpoints.prepare()
            newest = self.checkpoints.latest()
        step = self.fabric.broadcast(newest.step if newest else None)
        if step is None:
            return
        self._restore(newest or self.checkpoints.load(step))
        logger.info("resuming %s from step %d of %d", self.run.label, self.step, self.total)

    def _restore(self, saved: Checkpoint) -> None:
        self._check_same_run(saved)
        load_weights(self.module, _subset("model", saved.tensors))
        self.ema.load(_subset("ema", saved.tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _subset("optimizer", saved.tensors).items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.fabric.strategy.precision.load_state_dict(saved.metadata["scaler"])
        self.skipped = saved.metadata["skipped"]
        self.step = saved.step

    def _check_same_run(self, saved: Checkpoint) -> None:
        path, metadata, world = self.checkpoints.path(saved.step), saved.metadata, self.fabric.world_size
        if metadata["world_size"] != world:
            raise CheckpointError(
                f"checkpoint {path} was made by {metadata['world_size']} processes and this run has {world}: "
                f"start it with {metadata['world_size']}, or delete {self.run.scratch} to start anew"
            )
        before, now = metadata["identity"], json.loads(json.dumps(self._identity()))
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        if changed:
            diff = "; ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in changed)
            raise CheckpointError(
                f"checkpoint {path} was made with another configuration ({diff}): "
                f"restore the values, or delete {self.run.scratch} to start anew"
            )
        if metadata["threads"] != torch.get_num_threads():
            logger.warning(
                "resuming with %d threads what ran with %d: sums may differ in the last bit",
                torch.get_num_threads(),
                metadata["threads"],
            )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _subset(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


class Trace:
    """`trace.jsonl`: a line per finished step, cut back to the resumed step, so that it reads as one run."""

    def __init__(self, path: Path, step: int, writes: bool) -> None:
        self.path, self.step, self.writes = path, step, writes
        self.file: IO[str] | None = None

    def __enter__(self) -> Trace:
        if self.writes:
            lines = self.path.read_text().splitlines()[: self.step] if self.path.exists() else []
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
            self.file = self.path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the line of a step."""
        if self.file:
            kept = {k: v for k, v in metrics.items() if k not in ("stop", "step_s", "data_wait_s")}
            self.file.write(json.dumps({"step": step} | kept) + "\n")

    def flush(self) -> None:
        """Put the lines on the disk, before a checkpoint says that their steps are done."""
        if self.file:
            os.fsync(self.file.fileno())
