"""A pruning that is disturbed, at any line, by any signal, for want of memory: the model is untouched, or pruned."""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Lines, differences, each_line, photograph
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast import stages
from diffprune_fast.ops import backends, cpu
from diffprune_fast.plan.keep_sets import sliced_shapes
from diffprune_fast.pruned.record import record_of
from diffprune_fast.slicing import commit
from diffprune_fast.slicing.commit import carry_out

PRUNE, DROP, SHALLOWER = (
    sys.modules[f"diffprune_fast.{name}"] for name in ("slicing.prune", "depth.drop_blocks", "depth.shallower")
)
SLICERS = [n for n in ("cpu", "reference") if backends()[f"slice_channels/{n}"] == "ok"]


class Net(nn.Module):
    """Convolutions, a norm with buffers, heads whose softmax scale follows their size, and blocks that can go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = h + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        for block in self.blocks:
            h = block(h)
        return self.last(h)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


X = (torch.zeros(1, 3, 4, 4),)


def _keep(plan: dpf.Plan) -> dict[str, np.ndarray]:
    return dpf.select(plan, np.random.default_rng(0).random(plan.n_units), ratio=0.4, round_to=1).keep


def _trained() -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def plan() -> dpf.Plan:
    return dpf.trace(Net(), X)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands here is what comes after the walk on meta and the proof in a copy, which take most of the time and
    change nothing."""
    monkeypatch.setattr(PRUNE, "retrace", lambda *a: None)
    monkeypatch.setattr(PRUNE, "prove", lambda *a: None)


def _tried(
    make: Callable[[], Any], work: Callable[..., Any], error: type[BaseException], begin: Any, *files: str
) -> None:
    """Raise at every line, each time on something freshly made: ``work(*make())``; untouched, or done with a result."""
    made = make()
    calm = Lines(-1, begin)
    calm.run(lambda: work(*made))
    wanted = photograph(*made)
    survived: list[str] = []
    assert calm.count > 20
    for at in each_line(calm.order, files):
        made = make()
        before = photograph(*made)
        fault = Lines(at, begin, error)
        result = None
        try:
            result = fault.run(lambda made=made: work(*made))
        except BaseException as raised:
            result = getattr(raised, "result", None)
        after = photograph(*made)
        if result is None and (changed := differences(before, after)):
            survived.append(f"{fault.where}: raised, and changed {changed[:3]}")
        if result is not None and (other := differences(wanted, after, identity=False)):
            survived.append(f"{fault.where}: a result, but {other[:3]} not as they should be")
    assert survived == []


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(
    ("backend", "error"), [(n, e) for n in SLICERS for e in (MemoryError, KeyboardInterrupt)][: len(SLICERS) + 1]
)
def test_a_fault_at_any_line_of_a_pruning(plan: dpf.Plan, backend: str, error: type[BaseException]) -> None:
    keep = _keep(plan)

    def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> dpf.PruneResult:
        return dpf.prune(model, plan, keep, optimizer=optimizer, example_inputs=X, backend=backend)

    _tried(_trained, work, error, (PRUNE, "check_optimizer"))


@pytest.mark.usefixtures("checked")
def test_a_fault_while_a_copy_is_pruned_leaves_the_original(plan: dpf.Plan) -> None:
    keep = _keep(plan)

    def work(model: nn.Module, _: Any = None) -> dpf.PruneResult:
        return dpf.prune(model, plan, keep, inplace=False, example_inputs=X)

    _tried(_trained, work, MemoryError, (PRUNE, "check_optimizer"))


def test_a_fault_while_blocks_are_dropped() -> None:
    def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> dpf.PruneResult:
        return dpf.drop_blocks(model, "blocks.1", optimizer=optimizer, example_inputs=X)

    _tried(_trained, work, KeyboardInterrupt, (DROP, "put_back_steps"))


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(("inplace", "error"), [(True, KeyboardInterrupt), (False, MemoryError)])
def test_a_fault_after_scoring_rotating_and_dropping_blocks(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], inplace: bool
) -> None:
    """The whole way; what it costs most (scores, solutions) is made up beforehand."""
    shallow = Net()
    dpf.drop_blocks(shallow, "blocks.0", example_inputs=X)
    plan = dpf.trace(shallow, X)
    data = [torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))]
    options: dict[str, Any] = {"loss_fn": lambda m, b, *a: m(b).square().mean((1, 2)), "progress": False, "ratio": 0.4}
    scores = dpf.score(shallow, data, plan, max_samples=4, **{k: v for k, v in options.items() if k != "ratio"})

    def solved(model: nn.Module, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        return found

    found = dpf.compensation.compensate(dpf.prune(shallow, plan, _keep(plan), inplace=False, example_inputs=X).model,
                                        shallow, data, loss_fn=options["loss_fn"], kept={}, progress=False)  # fmt: skip
    monkeypatch.setattr(stages, "score", functools.wraps(dpf.score)(lambda *a, **k: scores))
    monkeypatch.setattr(stages, "trace", lambda *a, **k: plan)
    monkeypatch.setattr(stages.compensation, "compensate", solved)
    monkeypatch.setattr(stages, "dry_run", lambda model, plan, keep, **k: sliced_shapes(model, plan, keep))
    blocks = dpf.depth.find_blocks(Net(), X)
    monkeypatch.setattr(SHALLOWER, "find_blocks", lambda *a: blocks)

    def work(model: nn.Module) -> dpf.PruneResult:
        return dpf.score_and_prune(model, data, example_inputs=X, drop_blocks="blocks.0", inplace=inplace, **options)

    _tried(
        lambda: (Net(),), work, error, (stages.Stages, "slice_and_compensate"), "method.py", "stages.py", "commit.py"
    )


def test_calls_are_made_once_and_to_the_end() -> None:
    log: list[str] = []

    def fails(n: int, error: BaseException, name: str) -> Callable[[], None]:
        times = iter(range(n))

        def call() -> None:
            if next(times, None) is not None:
                raise error
            log.append(name)

        return call

    a, d = (lambda name=name: log.append(name) for name in "ad")
    assert carry_out([a, fails(1, MemoryError(), "b"), fails(9, OSError(), "c"), d], "result") == "result"
    assert log == ["a", "b", "d"]
    with pytest.raises(KeyboardInterrupt) as raised:
        carry_out([a, fails(1, KeyboardInterrupt(), "b"), d], "result")
    assert raised.value.result == "result"
    assert log[3:] == ["a", "b", "d"]
    with pytest.raises(MemoryError):
        carry_out([fails(1, MemoryError(), "b"), a], "result")
    assert len(log) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_commit_waits_for_its_end(
    plan: dpf.Plan, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    model, optimizer = _trained()
    former = signal.signal(number, signal.default_int_handler)
    move = cpu._cpu.slice_channels if "cpu" in SLICERS else pytest.skip("needs the extension")

    class Native:
        SLICE_ENTRY = cpu._cpu.SLICE_ENTRY
        can_slice_in_place = cpu._cpu.can_slice_in_place

        @staticmethod
        def slice_channels(*args: Any) -> None:
            sender = threading.Thread(target=lambda: os.kill(os.getpid(), number))
            sender.start()
            sender.join()
            for _ in range(100):
                pass  # here a handler would run
            move(*args)

    monkeypatch.setattr(cpu, "_cpu", Native)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            dpf.prune(model, plan, _keep(plan), optimizer=optimizer, example_inputs=X, backend="cpu")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, former)
    result = raised.value.result
    assert result.model is model
    assert {n: tuple(p.shape) for n, p in model.named_parameters()}.items() <= result.shapes.items()
    assert record_of(model).about["keep"].keys() == result.keep.keys()


def test_interrupts_at_random_moments(plan: dpf.Plan, checked: None) -> None:
    assert interrupted(plan, 40) == []


def interrupted(plan: dpf.Plan, n: int, seed: int = 0) -> list[str]:
    """Interrupt ``n`` prunings, each at a random moment; what was neither untouched nor pruned with a result."""
    keep, rng, survivors = _keep(plan), random.Random(seed), []
    pruned, optimizer = _trained()
    began = time.perf_counter()
    dpf.prune(pruned, plan, keep, optimizer=optimizer, example_inputs=X)
    took = time.perf_counter() - began
    wanted = photograph(pruned, optimizer)
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # other tests' tools have callbacks in it, where an interrupt would be lost
    try:
        for i in range(n):
            model, optimizer = _trained()
            before, result, moment = photograph(model, optimizer), None, rng.uniform(0.0, 1.0)
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, moment * took))
                began = time.perf_counter()
                result = dpf.prune(model, plan, keep, optimizer=optimizer, example_inputs=X)
                took = 0.5 * took + 0.5 * (time.perf_counter() - began)
                time.sleep(10)
            except KeyboardInterrupt as error:
                result = result or getattr(error, "result", None)
            after = photograph(model, optimizer)
            bad = differences(before, after) if result is None else differences(wanted, after, identity=False)
            if bad:
                survivors.append(f"{i}: {moment:.3f} {'no result' if result is None else 'result'} {bad[:3]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        gc.enable()
    return survivors


LIMITED = """
import faulthandler, os, resource, sys
faulthandler.enable()
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from faults import differences, photograph
from test_all_or_nothing import big, pruned_big
pruned_big(*big({alias}))
deep = []
for _ in range(900):
    deep = [deep]
repr(deep)  # the stack has grown: a stack that can't is a segmentation fault, whoever is on it
made = big({alias})
wanted = photograph(*pruned_big(*made))
ends = []
for spare in {spares}:
    child = os.fork()
    if child == 0:
        model, optimizer, aliases = big({alias})
        before = photograph(model, optimizer)
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages + spare, hard))
        try:
            pruned_big(model, optimizer, aliases)
            end = 1
        except (MemoryError, RuntimeError) as error:
            end = 0
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        after = photograph(model, optimizer)
        bad = differences(wanted, after, identity=False) if end else differences(before, after)
        os._exit(2 if bad else end)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(ends)
"""


def big(alias: bool) -> tuple[nn.Module, torch.optim.Optimizer, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1200), nn.ReLU(), nn.Linear(1200, 1500), nn.ReLU(), nn.Linear(1500, 8))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return model, optimizer, [p.detach() for p in model.parameters()] if alias else []


def pruned_big(model: nn.Module, optimizer: torch.optim.Optimizer, aliases: list[Tensor]) -> Any:
    x = (torch.zeros(1, 8),)
    keep = {"0": np.arange(0, 1200, 2), "2": np.arange(0, 1500, 3)}
    plan = dpf.trace(model, x)
    dpf.prune(model, plan, keep, optimizer=optimizer, example_inputs=x)
    return model, optimizer


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
@pytest.mark.parametrize("alias", [False, True])
def test_a_real_limit_of_memory(alias: bool) -> None:
    """An alias of every parameter is held: then the slices need new memory, 1.2 MB of it; else none."""
    spares = [0, 1 << 14, 1 << 17, 1 << 19, 1 << 20, 3 << 19, 1 << 21, 1 << 22, 1 << 24]
    path = [str(Path(__file__).parent), *sys.path]
    script = LIMITED.format(path=path, alias=alias, spares=spares)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = eval(done.stdout.splitlines()[-1])
    # NumPy and PyTorch may crash by themselves where there is no memory, now and then; what is ours must not.
    crashed = re.findall(r'most recent call first\):\n  File "([^"]+)"', done.stderr)
    assert not [file for file in crashed if "diffprune_fast/ops" in file], done.stderr[:2000]
    assert ends.count(-signal.SIGSEGV) == len(crashed)
    assert set(ends) <= {0, 1, -signal.SIGSEGV}, f"{ends}\n{done.stderr[:2000]}"
    assert ends[-1] == 1


def test_no_step_of_a_result_is_left_after_the_commit(plan: dpf.Plan) -> None:
    """The time that slicing took is in the result and in the record alike."""
    model = Net()
    result = dpf.prune(model, plan, _keep(plan), example_inputs=X)
    assert result.seconds["slice"] > 0
    assert record_of(model).about["seconds"] == result.seconds
    assert commit.Change(result, ()).and_then((), seed=3).result.seed == 3
