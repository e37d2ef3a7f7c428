"""The doctor runs what it calls usable, and its exit code says whether the package can serve calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from support.packs import fresh_cache

from peftkernels import lora_linear
from peftkernels.cli import agreement, doctor
from peftkernels.cli.main import main


def test_json_report_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["versions"]["torch"] == version("torch")
    assert {"peftkernels", "python", "torch", "triton", "peft", "transformers"} == set(found["versions"])
    assert {"avx2", "avx512", "avx512_bf16", "amx"} == set(found["machine"]["features"])
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert set(found["backends"]) == {"reference", "eager", "cpu", "triton", "cuda"}
    for name in ("reference", "eager"):
        backend = found["backends"][name]
        assert backend["usable"]
        assert 0 <= backend["error"] < 1e-5
    for backend in found["backends"].values():
        assert backend["usable"] or backend["reason"]
    assert (found["pack_cache"] is not None) == (found["backends"]["cpu"]["reason"] is None)


def test_text_report_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("reference", "eager", "cpu", "triton", "cuda"):
        assert f"\n  {name} " in text
    assert "can serve calls" in text


def test_libraries_that_do_not_agree_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks for a release of peft in the calls that need it, not when it is installed."""
    installed = {"transformers": "5.24.0", "peft": "0.21.2", "safetensors": "0.2"}
    asked = {"transformers": ["safetensors>=0.4.3", "torch>=2.6; extra == 'torch'", "tokenizers>=99"], "peft": []}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(agreement, "version", version)
    monkeypatch.setattr(agreement, "requires", lambda name: version(name) and asked.get(name))
    monkeypatch.setattr(agreement, "_asked_later", lambda: ["peft>=0.22.0"])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "\n  transformers 5.24.0 asks for safetensors>=0.4.3, found 0.2\n" in text
    assert "\n  transformers 5.24.0 asks for peft>=0.22.0, found 0.21.2\n" in text
    assert text.count(" asks for ") == 2


def test_transformers_says_which_peft_it_asks_for() -> None:
    """The table that `agreement` reads is the one by which transformers decides."""
    integration = pytest.importorskip("transformers.integrations.peft", reason="transformers is not installed")
    assert f"peft>={integration.MIN_PEFT_VERSION}" in agreement._asked_later()


@pytest.mark.parametrize(
    ("setting", "limit", "meaning"),
    [
        ("50%", 3 << 29, "1.5 GiB, 50% of the memory that would be available without packs"),
        ("2GiB", 2 << 30, "2.0 GiB"),
        ("0", 0, "0 bytes"),
        ("unlimited", None, "no limit"),
    ],
)
def test_text_report_of_the_pack_cache(setting: str, limit: int | None, meaning: str) -> None:
    found = {"mode": "both", "weights": 3, "entries": 5, "bytes": 700 * 1024, "limit": limit, "limit_setting": setting}
    lines = doctor._describe_pack_cache({**found, "refused": 2, "hits": 7, "misses": 6})
    assert lines[:5] == [
        "  mode          both",
        f"  limit         {meaning}",
        "  kept          700.0 KiB: packs 5, weights 3",
        "  no room for   weights 2",
        "  calls         7 found a pack, 6 made one",
    ]


@pytest.fixture
def empty_cache() -> Iterator[None]:
    """No packs of other tests, whose dead weights may be freed at any moment."""
    with fresh_cache():
        yield


@pytest.mark.usefixtures("empty_cache")
def test_the_report_counts_the_packs_of_this_process() -> None:
    x, weight, lora_A, lora_B = (torch.randn(*shape) for shape in ((1, 8), (64, 8), (2, 8), (64, 2)))
    before = doctor.examine()["pack_cache"]
    lora_linear(x, weight, lora_A, lora_B, impl="cpu")
    after = doctor.examine()["pack_cache"]
    assert after["bytes"] - before["bytes"] == weight.nbytes
    assert after["weights"] - before["weights"] == after["entries"] - before["entries"] == 1
    del weight
    assert doctor.examine()["pack_cache"]["bytes"] == before["bytes"]


def test_unavailable_backend_is_explained_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "backend_status", lambda: {"eager": None, "cpu": "no compiler was found"})
    assert main(["doctor"]) == 0
    assert "cpu           cannot run: no compiler was found" in capsys.readouterr().out


def test_backend_that_raises_fails_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "backend_status", lambda: {"eager": None, "cuda": None})
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["eager"]["usable"]
    assert not found["backends"]["cuda"]["usable"]
    assert "a small call failed" in found["backends"]["cuda"]["reason"]


@pytest.mark.parametrize("wrong", ["scaled", "nan"])
def test_backend_that_computes_wrong_fails_the_doctor(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = doctor._small_call

    def call(impl: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        tensors = right(impl, dtype, device)
        if impl == "eager":
            tensors[2] = tensors[2] * (1.001 if wrong == "scaled" else float("nan"))
        return tensors

    monkeypatch.setattr(doctor, "_small_call", call)
    assert main(["doctor"]) == 1
    assert "CANNOT serve calls" in capsys.readouterr().out


def test_refused_setting_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> dict[str, str | None]:
        raise ValueError("PEFTKERNELS_CPU_PACK: found 'x', expected one of both, forward, off")

    monkeypatch.setattr(doctor, "backend_status", refuse)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith("PEFTKERNELS_CPU_PACK")
