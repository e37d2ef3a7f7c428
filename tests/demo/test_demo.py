"""The demo from end to end on a tiny encoder: beside peft from the same seeds, with every file it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from demo import data, requirements
from demo import model as demo_model
from demo import prepare as demo_prepare
from demo.batches import Encoded
from demo.command import main
from demo.measure import typical_and_longest_batches
from demo.recipe import RUN_NAMES, TITLES
from peftkernels.allocation import read_log
from peftkernels.cli.main import main as peftkernels_main

STEPS = 30
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """A finished demo."""

    out: Path
    printed: str
    results: dict[str, Any]

    def weights(self, run: str) -> dict[str, Any]:
        """What the training ``run`` left behind."""
        record: dict[str, Any] = torch.load(self.out / "runs" / f"{run}.pt", weights_only=True)
        return record


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """The demo sets the number of threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_options(tiny_model: Path, tiny_data: Path) -> list[str]:
    options = ["--quick", "--steps", str(STEPS), "--batch-size", "16", "--threads", "1"]
    return [*options, "--model", str(tiny_model), "--data", str(tiny_data)]


@pytest.fixture(scope="module")
def finished(small_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("demo") / "out"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.write", printed.append)
        code = main([*small_options, "--out", str(out)])
    assert code == 0
    return Finished(out, "".join(printed), json.loads((out / "results.json").read_text()))


def test_every_run_has_a_full_row(finished: Finished) -> None:
    runs = finished.results["runs"]
    assert list(runs) == ["frozen", *RUN_NAMES]
    for name, row in runs.items():
        assert row["milliseconds"] > 0
        assert row["ratio_p25"] <= row["ratio"] <= row["ratio_p75"]
        assert row["saved_bytes"] > 0
        if name != "frozen":
            assert 0 <= row["accuracy"] <= 1
            assert row["trainable_parameters"] > 0
            assert len(row["losses"]) == len(row["training_loop_milliseconds"]) == STEPS
    assert runs["frozen"]["ratio"] == 1
    assert runs["frozen"]["trainable_parameters"] == 0
    assert runs["head"]["saved_bytes"] < runs["frozen"]["saved_bytes"] < runs["lora"]["saved_bytes"]


def test_ranks_and_parameters_are_those_of_the_recipe(finished: Finished) -> None:
    runs = finished.results["runs"]
    matrices = 12  # six linear modules in each of two layers
    head = 32 * 3 + 3
    widths = 2 * (4 * (32 + 32) + 2 * (32 + 64))  # inputs plus outputs of all of them
    for library in ("", "peft-"):
        lora, adalora = runs[f"{library}lora"], runs[f"{library}adalora"]
        assert (lora["live_ranks"], lora["total_ranks"]) == (8 * matrices, 8 * matrices)
        assert (adalora["live_ranks"], adalora["total_ranks"]) == (8 * matrices, 12 * matrices)
        assert lora["trainable_parameters"] == 8 * widths + head
        assert adalora["trainable_parameters"] == 12 * widths + 12 * matrices + head
    assert runs["head"]["trainable_parameters"] == head
    assert runs["head"]["live_ranks"] is None


def test_same_seed_same_losses_as_peft(finished: Finished) -> None:
    for kind in ("lora", "adalora"):
        for curve in ("losses", "total_losses"):
            ours = np.array(finished.results["runs"][kind][curve][:20])
            theirs = np.array(finished.results["runs"][f"peft-{kind}"][curve][:20])
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=0)
    agreement = {entry["ours"]: entry for entry in finished.results["agreement"]}
    assert set(agreement) == {"lora", "adalora"}
    assert all(entry["holds"] and entry["steps"] == 20 for entry in agreement.values())


def test_orthogonality_term_is_part_of_both_adalora_losses(finished: Finished) -> None:
    for name in ("adalora", "peft-adalora"):
        row = finished.results["runs"][name]
        # At the start every ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F is near √12, and the term is half of their mean.
        assert row["total_losses"][0] - row["losses"][0] == pytest.approx(0.5 * 12**0.5, rel=0.05)


def test_budget_falls_from_all_ranks_to_the_target(finished: Finished) -> None:
    for name in ("adalora", "peft-adalora"):
        live = np.array(finished.results["runs"][name]["live_ranks_by_step"]).sum(1)
        assert live[0] == 144
        assert live[-1] == 96
        assert (np.diff(live) <= 0).all()


def test_table_shows_every_run(finished: Finished) -> None:
    for title in ("frozen, forward + backward", "head only", "LoRA, peftkernels", "AdaLoRA, peft "):
        assert title in finished.printed
    assert "96 / 144" in finished.printed
    assert f"{finished.results['runs']['lora']['accuracy']:.3f}" in finished.printed
    assert "DO NOT AGREE" not in finished.printed


def test_results_say_what_they_were_measured_on(finished: Finished) -> None:
    assert finished.results["versions"]["torch"] == version("torch")
    assert finished.results["machine"]["threads"] == 1
    assert finished.results["arguments"]["--seed"] == 0
    assert finished.results["data"]["training_texts"] + finished.results["data"]["test_texts"] == 240
    assert finished.results["timing"]["rounds"] >= 3


def test_picture_is_written(finished: Finished) -> None:
    picture = matplotlib.image.imread(finished.out / "live-ranks.png")
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_adapter_is_loaded_by_peft(finished: Finished, tiny_model: Path, kind: str) -> None:
    directory = finished.out / "adapters" / kind
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == kind.upper()
    encoder = AutoModel.from_pretrained(tiny_model, local_files_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # peft's false alarm about the rank_pattern that it writes itself.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(encoder, str(directory)).eval()
    trained = finished.weights(kind)
    if kind == "adalora":
        kept = {name.removesuffix(".lora_E"): mask for name, mask in config["rank_pattern"].items()}
        assert kept == trained["masks"]
        ranks = {n: p.shape[0] for n, p in loaded.named_parameters() if ".lora_E." in n}
        assert sum(ranks.values()) == 96
    head = load_file(directory / "head.safetensors")
    assert torch.equal(head["weight"], trained["weights"]["head.weight"])
    assert json.loads((directory / "labels.json").read_text()) == ["alpha", "beta", "gamma"]
    difference = {Path(entry["directory"]).name: entry for entry in finished.results["adapters"]}[kind]
    assert difference["holds"]
    assert difference["difference"] <= 1e-4 * difference["largest_logit"]


def test_cards_lie_beside_the_adapters(finished: Finished) -> None:
    for kind in ("lora", "adalora"):
        card = (finished.out / "adapters" / kind / "README.md").read_text()
        assert "library_name: peft" in card
        assert finished.results["arguments"]["--data"] in card
        for name, mask in finished.weights(kind)["masks"].items():
            digits = "".join(str(int(keep)) for keep in mask)
            assert f"| `{name}` | {sum(mask)}/{len(mask)} | `{digits}` |" in card


def test_decisions_are_logged_and_can_be_reported_on(finished: Finished, tmp_path: Path) -> None:
    assert [path.parent.name for path in finished.out.glob("runs/*/decisions.jsonl")] == ["adalora"]
    log = read_log(finished.out / "runs" / "adalora" / "decisions.jsonl")
    live = np.array(finished.results["runs"]["adalora"]["live_ranks_by_step"])
    for decision in log.decisions:
        own = [int(decision.kept[log.part(index)].sum()) for index in range(len(log.modules))]
        assert own == live[decision.step - 1].tolist()
    assert [module.name for module in log.modules] == finished.results["runs"]["adalora"]["modules"]
    assert peftkernels_main(["report", str(finished.out), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert f"{finished.results['runs']['adalora']['accuracy']:.3f}" in page
    assert finished.results["arguments"]["--data"] in page
    assert f"peftkernels report {finished.out}" in "".join(finished.printed.split("\n"))


def test_real_encoder_trains_like_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """all-MiniLM-L6-v2 on docstrings: 20 steps whose losses agree within 1e-3, for both kinds of adapter."""
    documents = data.select_modules(data.deduplicate(data.standard_library_documents()), seed=0)
    few = [d for d in documents if d.label in ("asyncio", "email", "xml")]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": d.text, "label": d.label}) + "\n" for d in few))
    options = ["--quick", "--steps", "20", "--batch-size", "8", "--max-tokens", "16", "--data", str(texts)]
    runs = "lora,adalora,peft-lora,peft-adalora"
    assert main([*options, "--runs", runs, "--json", "--out", str(tmp_path / "out")]) == 0
    results = json.loads(capsys.readouterr().out)
    for kind in ("lora", "adalora"):
        ours, theirs = results["runs"][kind], results["runs"][f"peft-{kind}"]
        assert len(ours["modules"]) == 36
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-3, atol=0)
        np.testing.assert_allclose(ours["total_losses"], theirs["total_losses"], rtol=1e-3, atol=0)
    assert results["runs"]["adalora"]["live_ranks"] == 288


def test_largest_and_average_batches_are_timed() -> None:
    lengths = [4] * 8 + [10] * 8 + [60] * 8
    training = Encoded([[1] * length for length in lengths], [0] * 24, pad_id=0)
    order = [[*range(start, start + 4)] for start in range(0, 24, 4)]
    typical, longest = typical_and_longest_batches(SimpleNamespace(training=training, order=order))
    # The average is (4 + 10 + 60) / 3 = 24.7 tokens a text: nearest are those of 10, then 4, then 60.
    assert [batch.tokens // 4 for batch in typical] == [10, 10, 4, 4, 60, 60]
    assert longest.tokens == 240


def test_timing_leaves_the_trained_weights_alone(finished: Finished, small_options: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demo.measure.time_steps", _no_timing)
        with pytest.raises(InterruptedError):
            main([*small_options, "--runs", "lora,adalora", "--out", str(tmp_path)])
    for kind in ("lora", "adalora"):
        untimed = torch.load(tmp_path / "runs" / f"{kind}.pt", weights_only=True)
        timed = finished.weights(kind)
        assert untimed["weights"].keys() == timed["weights"].keys()
        for name, value in untimed["weights"].items():
            assert torch.equal(value, timed["weights"][name]), name
        exported = load_file(finished.out / "adapters" / kind / "adapter_model.safetensors")
        kept = [name for name in exported if name.endswith(("lora_A", "lora_A.weight"))]
        assert len(kept) == 12


def test_a_clean_run_prints_nothing_but_its_progress(small_options: list[str], tmp_path: Path) -> None:
    """bitsandbytes, which peft imports where it is installed, told at length which kernels it could not download."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")
    done = subprocess.run(
        [sys.executable, "-m", "demo", *small_options, "--runs", "head,peft-lora", "--out", str(tmp_path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in offline},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = tuple(f"{title}: " for title in (TITLES["head"], TITLES["peft-lora"], "timing"))
    assert done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []


def _no_timing(*arguments: object, **options: object) -> None:
    raise InterruptedError


def test_json_is_printed_instead_of_the_table(
    small_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small_options, "--runs", "head", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["runs"]) == ["frozen", "head"]
    assert printed == json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "live-ranks.png").exists()


def test_without_peft_its_runs_are_left_out_and_it_is_said(
    small_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (demo_prepare, requirements):
        monkeypatch.setattr(module, "has_peft", lambda: False)
    monkeypatch.setattr("demo.export.has_peft", lambda: False)
    assert main([*small_options, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "peft is not installed: the comparison with it is left out" in captured.err
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["frozen", "head", "lora", "adalora"]
    assert main([*small_options, "--runs", "peft-lora", "--out", str(tmp_path)]) == 2
    assert "--runs: names peft-lora, but peft is not installed" in capsys.readouterr().err


def test_missing_packages_name_the_extra(
    small_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = requirements.importlib.util.find_spec

    def without_rich(name: str, *rest: Any) -> Any:
        return None if name == "rich" else find(name, *rest)

    monkeypatch.setattr(requirements.importlib.util, "find_spec", without_rich)
    assert main(small_options) == 2
    message = capsys.readouterr().err
    assert "not installed: rich" in message
    assert "'.[demo]'" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{tmp}/none"], "--model: {tmp}/none: no such directory"),
        (["--model", "{tmp}"], "--model: {tmp}: has no config.json"),
        (["--data", "{tmp}/none.jsonl"], "--data: {tmp}/none.jsonl: no such file"),
        (["--data", "{tmp}/bad.jsonl"], "--data: {tmp}/bad.jsonl, line 1: field 'label' is missing"),
        (["--batch-size", "1000"], "--batch-size: found 1000, expected at most 192"),
        (["--no-peft", "--runs", "peft-lora"], "--runs: names peft-lora, but --no-peft leaves it out"),
    ],
    ids=["model-path", "model-empty", "data-path", "data-line", "batch-size", "runs"],
)
def test_wrong_input_names_what_is_wrong(
    small_options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    out = tmp_path / "out"
    given = [option.format(tmp=tmp_path) for option in options]
    assert main([*small_options, *given, "--out", str(out)]) == 2
    assert f"python -m demo: error: {message.format(tmp=tmp_path)}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "lora,qlora"], "unknown run 'qlora'; expected some of head,lora"),
        (["--steps", "1"], "1 is too small, expected at least 2"),
        (["--seed", "x"], "'x' is not a whole number"),
    ],
)
def test_wrong_options_are_refused_by_the_parser(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_model_directory_is_named(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(demo_model.InputError, match=f"--model: {tmp_path}: the model cannot be loaded"):
        demo_model.load_encoder(tmp_path)


def test_pooling_layer_that_nobody_reads_is_not_adapted(tiny_model: Path) -> None:
    encoder = AutoModel.from_pretrained(tiny_model, local_files_only=True).requires_grad_(False)
    assert "pooler.dense" in dict(encoder.named_modules())
    adaptable = demo_model.adaptable_linears(encoder, "here")
    assert len(adaptable) == 12
    assert "pooler.dense" not in adaptable
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())


def test_copies_share_frozen_weights_only(tiny_model: Path) -> None:
    base = demo_model.TextClassifier(demo_model.load_encoder(tiny_model), 3)
    copy = demo_model.share_frozen(base)
    own = dict(base.named_parameters())
    for name, parameter in copy.named_parameters():
        assert (parameter is own[name]) == name.startswith("encoder.")


def test_mean_pooling_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(demo_model.mean_pool(hidden, mask), torch.tensor([[2.0, 3.0]]))
