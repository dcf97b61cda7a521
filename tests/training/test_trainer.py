"""The trainer in one process: schedule, average, order of samples, resume, precision, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from base.errors import PipelineError
from base.stopping import Preempted
from tests.training.toy import Recorder, ToyBatch, ToyDataset, ToyTask, collate, config, trace, weights_digest
from training import trainer
from training.checkpoint import CheckpointError
from training.ema import EMA, ema_decay
from training.gradients import pulls
from training.run import Run
from training.sampler import Key, StepBatches, epoch_order
from training.schedule import learning_rate
from training.trainer import NonFiniteError, parameter_groups, train


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def fit(
    folder: Path,
    *,
    stop_after: int = 0,
    task: Any = None,
    data: Any = None,
    tracker: Any = None,
    seed: int = 7,
    classes: Any = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Train the toy; `stop_after` asks it to stop after so many steps of this call."""
    asked = iter(range(1, 10**6))
    return train(
        task or ToyTask(),
        data or ToyDataset(),
        collate,
        config(**changes),
        Run(seed, folder, tracker or Recorder(), lambda: next(asked) == stop_after),
        classes,
    )


# --- schedule


@pytest.mark.parametrize(("total", "warmup"), [(10, 0.3), (100, 0.25), (37, 0.5), (600, 0.3)])
def test_one_cycle_is_torchs(total: int, warmup: float) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=total, pct_start=warmup)
    for step in range(total):
        assert learning_rate(step, total, 0.003, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_cosine_closed_form() -> None:
    rates = [learning_rate(s, 100, 2.0, 0.2, "cosine") for s in range(100)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 79 / 80))


@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from(["one_cycle", "cosine"]))
def test_rate_stays_between_zero_and_the_peak(total: int, warmup: float, shape: Any) -> None:
    rates = [learning_rate(s, total, 0.1, warmup, shape) for s in range(total)]
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates)


# --- factors of the rate


def test_a_module_moves_by_its_factor_and_a_frozen_one_not_at_all(tmp_path: Path) -> None:
    """AdamW's first step is the rate itself in every weight, whatever the gradient, so the factor shows exactly."""
    task = ToyTask(norm=False)
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    changes = {
        "lr_factors": {"0": 0.0, "5": 0.1},
        "ema_decay": 0.0,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup": 0.0,
    }
    after = fit(tmp_path / "slow", task=task, epochs=1, batch_size=20, **changes)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["0.bias"], before["0.bias"])
    plain = fit(tmp_path / "plain", task=ToyTask(norm=False), epochs=1, batch_size=20, **changes | {"lr_factors": {}})
    assert not torch.equal(plain["0.weight"], before["0.weight"])
    moved, free = (state["5.weight"] - before["5.weight"] for state in (after, plain))
    assert torch.allclose(moved, 0.1 * free, atol=1e-7)
    assert float(free.abs().max()) == pytest.approx(0.01, rel=1e-3)


def test_the_innermost_factor_counts() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    groups = parameter_groups(module, 0.1, {"0": 0.5, "0.1": 0.25})
    factor = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert [factor[id(part.weight)] for part in (module[0][0], module[0][1], module[1])] == [0.5, 0.25, 1.0]


def test_an_unknown_module_of_a_factor_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"lr_factors: the model has no module 'head'; it has 0, 1, 2, 3, 4, 5"):
        fit(tmp_path, lr_factors={"head": 0.1})


# --- average


def test_ema_closed_form() -> None:
    module = nn.BatchNorm1d(1)
    with torch.no_grad():
        module.weight.fill_(5.0)
    ema, expected = EMA(module, 0.6), 5.0
    for n, value in enumerate([1.0, -2.0, 3.0, 8.0], 1):
        with torch.no_grad():
            module.weight.fill_(value)
            module.running_mean.fill_(10 * value)
        module.num_batches_tracked.fill_(n)
        ema.update(module, n)
        expected = min(0.6, (1 + n) / (10 + n)) * expected + (1 - min(0.6, (1 + n) / (10 + n))) * value
    assert ema.state["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.state["num_batches_tracked"].item() == 4
    assert ema.state["running_mean"].item() != 0  # buffers are averaged too
    assert ema_decay(0.6, 1000) == 0.6


def test_ema_off_is_the_last_state() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.0)
    with torch.no_grad():
        module.weight.mul_(3)
    ema.update(module, 1)
    assert torch.equal(ema.state["weight"], module.weight)


# --- order of samples


@settings(max_examples=40)
@given(st.integers(4, 60), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_ranks_share_the_steps_of_one_process(length: int, seed: int, world: int, accumulate: int) -> None:
    batch = min(8, length // 8 * 8) or 8
    length = max(length, batch)
    one = list(StepBatches(length, batch, 2, seed))
    parts = [
        list(StepBatches(length, batch, 2, seed, rank=r, world=world, accumulate=accumulate)) for r in range(world)
    ]
    for step, keys in enumerate(one):
        span = slice(step * accumulate, (step + 1) * accumulate)
        assert [key for part in parts for micro in part[span] for key in micro] == keys


def test_an_epoch_sees_every_sample_at_most_once_and_resumes_at_any_step() -> None:
    batches = list(StepBatches(22, 4, 3, seed=1))
    assert len(batches) == 15 == len(StepBatches(22, 4, 3, seed=1))
    for epoch in range(3):
        items = [key.item for keys in batches[5 * epoch : 5 * epoch + 5] for key in keys]
        assert len(set(items)) == 20
    assert batches[0] != batches[5]
    for first in range(15):
        assert list(StepBatches(22, 4, 3, seed=1, first=first)) == batches[first:]
    assert batches[0][0] == Key(0, 0, int(epoch_order(22, 1, 0)[0]))


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a multiple of 3"):
        StepBatches(20, 4, 1, 0, world=3)
    with pytest.raises(ValueError, match="larger than the dataset of 3 samples"):
        StepBatches(3, 4, 1, 0)


# --- a whole run


def test_learns_and_reports(tmp_path: Path) -> None:
    tracker = Recorder()
    fit(tmp_path, tracker=tracker, epochs=12, lr=0.02, log_every=5, task=ToyTask(dropout=0.0))
    losses = [line["loss"] for line in trace(tmp_path)]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    steps, metrics = zip(*tracker.metrics, strict=True)
    assert steps == tuple(range(5, 61, 5))
    expected = {"loss", "mse", "size", "lr", "grad_norm", "data_wait_s", "step_s", "samples_per_s"}
    assert set(metrics[0]) == {f"train/{name}" for name in expected} | {"epoch"}
    assert metrics[-1]["epoch"] == pytest.approx(60 * 4 / 22)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_bit_exact_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    whole = fit(tmp_path / "whole", precision=precision)
    done = 0
    for pause in (1, 3, 5, 4):  # inside an epoch, at its end, after it
        with pytest.raises(Preempted) as stopped:
            fit(tmp_path / "parts", stop_after=pause, precision=precision, checkpoint_minutes=60)
        done += pause
        assert stopped.value.step == done
        assert stopped.value.code == 75
    parts = fit(tmp_path / "parts", precision=precision, checkpoint_minutes=60)
    assert weights_digest(parts) == weights_digest(whole)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    state = fit(tmp_path)
    lines = trace(tmp_path)
    assert weights_digest(fit(tmp_path)) == weights_digest(state)
    assert trace(tmp_path) == lines


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone = fit(tmp_path / "alone", workers=0)
    assert weights_digest(fit(tmp_path / "two", workers=2)) == weights_digest(alone)
    assert trace(tmp_path / "two") == trace(tmp_path / "alone")


def test_seed_changes_order_and_draws(tmp_path: Path) -> None:
    assert weights_digest(fit(tmp_path / "a", seed=1)) != weights_digest(fit(tmp_path / "b", seed=2))


def test_accumulated_parts_make_the_same_step(tmp_path: Path) -> None:
    def exact() -> ToyTask:
        return ToyTask(norm=False, dropout=0.0)

    whole = fit(tmp_path / "whole", task=exact(), ema_decay=0.0)
    parts = fit(tmp_path / "parts", task=exact(), ema_decay=0.0, accumulate=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_published_state_is_the_average(tmp_path: Path) -> None:
    task = ToyTask()
    state = fit(tmp_path, task=task)
    assert state.keys() == task.module.state_dict().keys()
    assert not torch.equal(state["0.weight"], task.module.state_dict()["0.weight"])


class PrecisionTask(ToyTask):
    """Records the types that reach the loss and that the net computes in."""

    seen: list[torch.dtype]

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        self.seen = [batch.images.dtype, batch.targets.dtype, self.module[0](batch.images).dtype]
        return super().loss(batch, progress)


@pytest.mark.parametrize("unit", [*trainer.BFLOAT16_UNITS, "avx512_f"])
def test_mixed_precision_leaves_the_batch_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """Coordinates in bfloat16 would be 0.25 m wrong at 50 m. A CPU without bfloat16 does not emulate it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", unit: True})
    task = PrecisionTask()
    fit(tmp_path, task=task, precision="bf16-mixed", epochs=1)
    inside = torch.bfloat16 if unit in trainer.BFLOAT16_UNITS else torch.float32
    assert task.seen == [torch.float32, torch.float32, inside]


class WatchingTask(ToyTask):
    """Adds values that are only looked at; the first would rule the loss, the second stop the run."""

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        huge = 1e6 * self.module[0].weight.sum()
        return super().loss(batch, progress) | {"watch/toy/huge": huge, "watch/toy/nan": huge * torch.nan}


def test_watched_values_are_logged_and_not_minimised(tmp_path: Path) -> None:
    tracker = Recorder()
    plain, watched = fit(tmp_path / "a"), fit(tmp_path / "b", task=WatchingTask(), tracker=tracker)
    assert weights_digest(watched) == weights_digest(plain)
    for line, other in zip(trace(tmp_path / "b"), trace(tmp_path / "a"), strict=True):
        assert {name: line[name] for name in other} == other  # the loss and its gradient's norm among them
        assert abs(line["watch/toy/huge"]) > 1e3
        assert math.isnan(line["watch/toy/nan"])
    assert "train/watch/toy/huge" in tracker.metrics[0][1]


class TaughtTask(ToyTask):
    """The toy's second loss is a teacher's."""

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        losses = super().loss(batch, progress)
        return {"mse": losses["mse"], "distill/size": losses["size"], "watch/size": losses["size"] * 1e6}


def test_comparing_gradients_changes_nothing(tmp_path: Path) -> None:
    plain, tracker = fit(tmp_path / "plain"), Recorder()
    compared = fit(tmp_path / "compared", task=TaughtTask(), tracker=tracker, gradients_every=4)
    assert weights_digest(compared) == weights_digest(plain)
    curves = [(step, values) for step, values in tracker.metrics if any(name.startswith("pull/") for name in values)]
    assert [step for step, _ in curves] == [1, 5, 9, 13]  # counted as the other curves are: after the step
    for _, values in curves:
        assert values.keys() == {"gradient/mse", "gradient/distill/size", "pull/size"}
        assert values["pull/size"] == pytest.approx(values["gradient/distill/size"] / values["gradient/mse"])
        assert 0 < values["gradient/mse"] < 100


def test_a_pull_is_a_share_of_what_the_truth_pulls() -> None:
    student, adapter = nn.Linear(9, 1, bias=False), nn.Linear(9, 1)
    frozen = nn.Linear(9, 1).requires_grad_(False)
    student.add_module("frozen", frozen)
    weight = student.weight.sum()  # its gradient has norm 3
    losses = {
        "box": 2 * weight,
        "depth": -5 * weight + frozen.weight.sum(),
        "distill/near": 0.6 * weight + 100 * adapter.weight.sum(),
        "distill/late": 0.0 * weight,
        "distill/elsewhere": adapter.weight.sum(),
        "distill/constant": torch.tensor(7.0),
    }
    found = pulls(losses, student)
    gradients = {"box": 6.0, "depth": 15.0, "distill/near": 1.8, "distill/late": 0.0}
    gradients |= {"distill/elsewhere": 0.0, "distill/constant": 0.0}
    shares = {"near": 0.2, "late": 0.0, "elsewhere": 0.0, "constant": 0.0}  # of the 9 of box and depth together
    expected = {f"gradient/{k}": v for k, v in gradients.items()} | {f"pull/{k}": v for k, v in shares.items()}
    assert found == pytest.approx(expected)
    without_truth = pulls({"distill/near": losses["distill/near"]}, student)
    assert without_truth == pytest.approx({"gradient/distill/near": 1.8})


def test_a_module_can_do_without_weight_decay() -> None:
    free = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 3))
    free.weight_decay = False
    module = nn.ModuleDict({"free": free, "other": nn.Linear(3, 2)})
    decayed, rest = parameter_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module["other"].weight)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in free.parameters()} | {id(module["other"].bias)}


# --- balance and milestones


class SeenTask(ToyTask):
    """Remembers the samples of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        self.seen.append(batch.tokens)
        return super().loss(batch, progress)


def test_balanced_training_draws_from_the_classes(tmp_path: Path) -> None:
    classes = [{0}] * 20 + [{1}, set()]  # a class that one sample holds, and a sample without any
    whole, parts, tracker = SeenTask(), SeenTask(), Recorder()
    state = fit(tmp_path / "whole", task=whole, balanced=True, classes=lambda: classes, tracker=tracker)
    tokens = [token for step in whole.seen for token in step]
    assert len(tokens) == 3 * 20  # 21 pairs over two classes: 10 draws for each of them
    assert tokens.count("token-20") == 30
    assert "token-21" not in tokens
    assert tracker.metrics[-1][1]["epoch"] == 3
    with pytest.raises(Preempted):
        fit(tmp_path / "parts", task=parts, balanced=True, classes=lambda: classes, stop_after=7)
    resumed = fit(tmp_path / "parts", task=parts, balanced=True, classes=lambda: classes)
    assert parts.seen == whole.seen
    assert weights_digest(resumed) == weights_digest(state)


def test_balanced_training_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"train: train\.balanced needs samples with classes"):
        fit(tmp_path, balanced=True)
    fit(tmp_path, classes=lambda: pytest.fail("asked for"))  # not where training is not balanced


def test_milestones_lower_the_rate(tmp_path: Path) -> None:
    fit(tmp_path, schedule="multi_step", milestones=[0.4, 0.8], warmup=0.0, lr=0.01)
    rates = [line["lr"] for line in trace(tmp_path)]
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 6 + [0.0001] * 3)


def test_biases_and_norms_have_no_weight_decay() -> None:
    matrices, vectors = parameter_groups(ToyTask().module, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2, 4}
    assert {p.ndim for p in vectors["params"]} == {1}


# --- refusals


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_names_step_and_samples(tmp_path: Path, workers: int) -> None:
    order = epoch_order(22, 7, 0)
    batch = [f"token-{item}" for item in order[8:12]]  # step 2
    with pytest.raises(NonFiniteError, match="step 2: mse is nan") as error:
        fit(tmp_path, data=ToyDataset(poison=int(order[9])), workers=workers)
    assert ", ".join(batch) in str(error.value)
    assert len(trace(tmp_path)) == 2
    assert all(t.isfinite().all() for t in fit(tmp_path).values())  # data repaired: continues from step 2


class SteepTask(ToyTask):
    """A finite loss with an infinite gradient."""

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        return {"root": (self.module(batch.images).sum() * 0).sqrt()}


def test_infinite_gradient_names_weights(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 0: grad_norm is nan; samples: token-.*first weights .*0\.weight"):
        fit(tmp_path, task=SteepTask())


def test_changed_configuration_is_refused_with_a_diff(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match=r"another configuration \(epochs: 3 -> 4; lr: 0\.01 -> 0\.02\)"):
        fit(tmp_path, lr=0.02, epochs=4)
    with pytest.raises(CheckpointError, match=r"samples: 22 -> 23; seed: 7 -> 8"):
        fit(tmp_path, seed=8, data=ToyDataset(23))
    fit(tmp_path, workers=1, checkpoint_minutes=9, log_every=3)  # these change no result


def test_trace_lines_are_json_and_cut_back(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, stop_after=4)
    with (tmp_path / "trace.jsonl").open("a") as file:  # a step after the checkpoint, and a line that a kill cut
        file.write(json.dumps({"step": 5, "loss": 0.0}) + '\n{"step": 6, "lo')
    fit(tmp_path)
    assert [line["step"] for line in trace(tmp_path)] == list(range(1, 16))
    assert trace(tmp_path)[4]["loss"] > 0
