"""The comparison of scales and learning rates, on a tiny encoder."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_encoder
from torch import nn

from bench import adapter_scale, adapter_scale_report
from bench.adapter_growth import Growth, adapter_layers, delta_norm, factors, orthogonality_shares
from bench.adapter_run import Point, Task, build, load_task, measured_steps, train_point
from demo.batches import collate
from demo.options import Options
from demo.prepare import prepare
from peftkernels.nn import AdaLoRALinear, LoRALinear

STEPS = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_encoder.write_model(folder / "model"), tiny_encoder.write_texts(folder / "texts.jsonl")


@pytest.fixture(scope="module")
def options(paths: tuple[Path, Path]) -> Options:
    return Options(seed=3, steps=STEPS, batch_size=16, max_tokens=24, model=paths[0], data=paths[1])


@pytest.fixture(scope="module")
def task(options: Options) -> Task:
    return load_task(options)


def test_validation_part_is_carved_out_of_every_class_of_the_training_texts(options: Options, task: Task) -> None:
    demo = prepare(options, ("lora",))
    rows = [(tuple(ids), label) for ids, label in zip(demo.training.ids, demo.training.classes, strict=True)]
    parts = [
        [(tuple(ids), label) for ids, label in zip(part.ids, part.classes, strict=True)]
        for part in (task.training, task.validation)
    ]
    assert Counter(parts[0]) + Counter(parts[1]) == Counter(rows)
    assert not set(parts[0]) & set(parts[1])
    whole, held_out = Counter(label for _, label in rows), Counter(label for _, label in parts[1])
    assert held_out == {label: round(0.2 * count) for label, count in whole.items()}
    assert task.test == demo.test
    assert len(task.order) == STEPS
    assert max(index for batch in task.order for index in batch) < len(task.training)


@pytest.mark.parametrize("kind", [LoRALinear, AdaLoRALinear])
def test_delta_norm_is_that_of_the_matrix(kind: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    layer = kind.from_linear(nn.Linear(13, 7), 4, 6)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    A, B, gates = factors(layer)
    if gates is not None:
        with torch.no_grad():
            layer.lora_E[1] = 0
    formed = layer.scaling * (B.double() @ ((1 if gates is None else gates.double()) * A.double()))
    assert delta_norm(layer) == pytest.approx(float(formed.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("point", "kind"), [(Point(4, None, 1e-2, 2.0), LoRALinear), (Point(4, 2, 1e-2, 2.0, 0.1), AdaLoRALinear)]
)
def test_growth_is_none_at_first_and_then_that_of_the_layers(task: Task, point: Point, kind: type[nn.Module]) -> None:
    run = build(point, task.start)
    batch = collate(task.validation, range(8))
    growth = Growth(run, batch)
    before = growth.measure()
    assert before["delta"] == before["moved_A"] == before["moved_B"] == before["outputs"] == before["embedding"] == 0
    layers = adapter_layers(run.classifier)
    assert len(layers) == len(task.start.adaptable) and {type(layer) for layer in layers.values()} == {kind}
    for indices in task.order[:3]:
        run.step(collate(task.training, indices))
    after = growth.measure()
    assert after["delta"] == pytest.approx(statistics.median(delta_norm(layer) for layer in layers.values()))
    assert after["moved_B"] > 0
    layer = next(iter(layers.values()))
    given: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, arguments, output: given.append(arguments[0]))
    _, shares = growth._forward()
    handle.remove()
    A, B, gates = factors(layer)
    x = given[0][batch.attention_mask.bool()]
    delta = layer.scaling * (B @ (A if gates is None else gates * A))
    expected = float((x @ delta.T).norm() / (x @ layer.base_layer.weight.T).norm())
    assert shares[0] == pytest.approx(expected, rel=1e-3)


def test_share_of_the_orthogonality_term_is_that_of_two_backward_passes(task: Task) -> None:
    point = Point(4, 2, 1e-2, 2.0, 0.3)
    run = build(point, task.start)
    for indices in task.order[:2]:
        run.step(collate(task.training, indices))
    batch = collate(task.training, task.order[2])
    layers = adapter_layers(run.classifier).values()
    A = [layer.lora_A for layer in layers]
    output = run.model(**batch.inputs())
    task_gradients = torch.autograd.grad(output.loss, A, retain_graph=True)
    gradients = torch.autograd.grad(run.allocator.regularization(), A)  # type: ignore[attr-defined]

    def norm(parts: tuple[torch.Tensor, ...]) -> float:
        return float(sum(part.square().sum() for part in parts) ** 0.5)

    shares: list[dict[str, float]] = []
    with orthogonality_shares(run, 0.3, shares):
        run.step(batch)
    run.step(batch)
    assert len(shares) == 1
    assert shares[0]["A"] == pytest.approx(norm(gradients) / norm(task_gradients), rel=1e-2)


def test_a_gate_rate_is_a_scale(task: Task) -> None:
    """Adam's steps do not depend on a gradient's size: gates that are four times as fast are a scale of four times."""
    still = replace(task, start=replace(task.start, recipe=replace(task.start.recipe, weight_decay=0.0)))
    scaled, _ = train_point(Point(4, 2, 5e-3, 8.0, 0.1), still)
    faster, _ = train_point(Point(4, 2, 5e-3, 2.0, 0.1, gate_lr=4.0), still)
    other, _ = train_point(Point(4, 2, 5e-3, 2.0, 0.1), still)
    deltas = [[at["delta"] for at in run["growth"]] for run in (scaled, faster, other)]
    # The gates' first gradients are so small here that Adam's eps shows in the first two steps.
    assert deltas[0][2:] == pytest.approx(deltas[1][2:], rel=2e-2)
    assert deltas[0][-1] > 2 * deltas[2][-1]
    assert scaled["growth"][-1]["E"] == pytest.approx(faster["growth"][-1]["E"] / 4, rel=2e-2)


def test_fixed_ranks_stay_and_adaptive_ones_fall(task: Task) -> None:
    gated, _ = train_point(Point(4, 4, 5e-3, 2.0, 0.1), task)
    adaptive, _ = train_point(Point(4, 2, 5e-3, 2.0, 0.1), task)
    assert gated["adapter"] == "gated r=4" and adaptive["adapter"] == "AdaLoRA 4→2"
    assert adaptive["live_ranks"] <= 2 * len(task.start.adaptable)
    assert gated["growth"][-1]["E"] > 0


def test_measured_steps() -> None:
    assert measured_steps(112) == [1, 2, 4, 8, 14, 16, 28, 32, 42, 56, 64, 70, 84, 98, 112]
    assert measured_steps(3) == [1, 2, 3]


@pytest.fixture
def command(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path, list[Point]]:
    repeated = [Point(2, None, 1e-2, 2.0), Point(4, 2, 1e-2, 4.0, 0.1)]
    grid = [*repeated, Point(4, 2, 1e-2, 1.0, 0.1), *(replace(point, seed=1) for point in repeated)]
    monkeypatch.setattr(adapter_scale, "grid", lambda: grid)
    docs = tmp_path / "page.md"
    docs.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("repeated", "formula", "single")))
    folders = [f"--{name}={tmp_path / name}" for name in ("runs", "results", "plots")]
    inputs = ["--steps=4", f"--model={paths[0]}", f"--data={paths[1]}"]
    return [*folders, f"--docs={docs}", *inputs], tmp_path, grid


def test_command_goes_on_where_it_was_and_tests_only_what_was_repeated(
    command: tuple[list[str], Path, list[Point]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, folder, grid = command
    trained: list[str] = []

    def fail_at_the_third(point: Point, task: Task) -> object:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(point.key)
        return train_point(point, task)

    monkeypatch.setattr(adapter_scale, "train_point", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        adapter_scale.main(arguments)
    assert len(list((folder / "runs").glob("*-seed*.json"))) == 2
    monkeypatch.setattr(
        adapter_scale, "train_point", lambda point, task: trained.append(point.key) or train_point(point, task)
    )
    assert adapter_scale.main(arguments) == 0
    assert trained == [point.key for point in grid]
    (path,) = (folder / "results").glob("adapter-scale-*.json")
    results = json.loads(path.read_text())
    assert [run["point"]["scale"] for run in results["runs"] if "test" not in run] == [1.0]
    assert str(folder) not in path.read_text()
    page = (folder / "page.md").read_text()
    assert page.count("| AdaLoRA 4→2 |") == 5 and page.count("| LoRA r=2 |") == 3 and "old" not in page
    assert (folder / "plots" / "adapter-scale.png").read_bytes().startswith(b"\x89PNG")
    assert adapter_scale.main([*arguments, "--steps=5"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert len(trained) == len(grid)


def _run(point: Point, test: float) -> dict[str, object]:
    last = {"step": 4, "delta": 0.5, "outputs": 0.01, "A": 0.1, "B": 0.2}
    scores = {"accuracy": test, "cross_entropy": 1.0}
    return {
        "point": vars(point),
        "adapter": point.adapter,
        "validation": scores,
        "test": scores,
        "growth": [last if point.target is None else {**last, "E": 0.3}],
    }


def test_differences_are_paired_with_the_lora_that_validation_prefers() -> None:
    poor, good, adaptive = Point(8, None, 1e-2, 2.0), Point(8, None, 1e-3, 2.0), Point(12, 8, 3e-3, 4.0, 0.1)
    runs = [
        _run(replace(point, seed=seed), accuracy)
        for point, accuracies in ((poor, (0.5, 0.6)), (good, (0.7, 0.8)), (adaptive, (0.72, 0.84)))
        for seed, accuracy in enumerate(accuracies)
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in adapter_scale_report.repeated_table(runs).splitlines()[2:]
    ]
    assert [row[0] for row in rows] == ["LoRA r=8", "LoRA r=8", "AdaLoRA 12→8"]
    assert [row[7] for row in rows] == ["55.0 ± 5.0", "75.0 ± 5.0", "78.0 ± 6.0"]
    assert [row[8] for row in rows] == ["-20.0 ± 0.0", "", "+3.0 ± 1.0"]


def test_formula_is_the_norm_of_independent_ranks_in_a_square_layer(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The measured side of the table on a layer whose factors are independent draws, as the formula assumes."""
    torch.manual_seed(seed)
    monkeypatch.setattr(adapter_scale_report, "WIDTH", 200)
    layer = AdaLoRALinear.from_linear(nn.Linear(200, 200), 8, 16)
    nn.init.normal_(layer.lora_E, std=0.3)
    A, B, gates = factors(layer)
    sizes = {"A": A, "B": B, "E": gates}
    at = {name: float(factor.square().mean().sqrt()) for name, factor in sizes.items() if factor is not None}
    growth = [{"step": 8, "lr_sum": 0.5, "delta": delta_norm(layer), **at}]
    run = {**_run(Point(8, 8, 1e-3, layer.scaling, 0.1), 0.5), "steps": 8, "growth": growth}
    cells = [cell.strip() for cell in adapter_scale_report.formula_table([run]).splitlines()[2].split("|")[1:-1]]
    assert float(cells[8]) == float(f"{at['E'] / 0.5:.2f}")
    assert float(cells[9]) == pytest.approx(float(cells[10]), rel=0.1)
