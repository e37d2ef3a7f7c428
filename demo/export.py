"""The trained adapters as files that HF peft loads, and the proof that it computes the same with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from demo.batches import Batch
from demo.builders import build
from demo.checkpoint import Store
from demo.model import TextClassifier, load_encoder, mean_pool
from demo.prepare import Prepared
from demo.requirements import has_peft
from demo.train import Record
from peftkernels._files import write_atomically
from peftkernels.allocation import RunLog, adapter_card, read_log
from peftkernels.allocation.logs.card import write_card
from peftkernels.cli.machine import PACKAGES, versions
from peftkernels.integrations.peft import save_adapter
from peftkernels.integrations.peft.adapter_files import CONFIG_NAME

EXPORTED_RUNS = ("lora", "adalora")
ADAPTERS = "adapters"
HEAD = "head.safetensors"
LABELS = "labels.json"
MOST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Export:
    """One saved adapter.

    Attributes:
        difference: greatest difference between the trained model's logits and those of HF peft with the files loaded
            onto a fresh encoder; None where peft is not installed.
        largest_logit: greatest logit; None where peft is not installed.
    """

    run: str
    directory: Path
    difference: float | None
    largest_logit: float | None

    @property
    def holds(self) -> bool:
        """True if peft computes the same, or is not installed."""
        if self.difference is None or self.largest_logit is None:
            return True
        return self.difference <= MOST_DIFFERENCE * self.largest_logit


def export_adapters(prepared: Prepared, records: dict[str, Record], batch: Batch, out: Path) -> list[Export]:
    """Save the adapter, the head and the labels of each training on peftkernels; compare on ``batch``."""
    return [_export(name, prepared, records[name], batch, out) for name in EXPORTED_RUNS if name in records]


@torch.no_grad()
def _export(name: str, prepared: Prepared, record: Record, batch: Batch, out: Path) -> Export:
    # The file names its targets by their endings, so layers that the demo leaves out must be there to be told apart.
    base = TextClassifier(load_encoder(prepared.directory, whole=True), len(prepared.labels))
    run = build(name, replace(prepared.start, base=base))
    run.model.load_state_dict(record.weights, strict=False)
    classifier = run.classifier.eval()
    directory = out / ADAPTERS / name
    save_adapter(
        classifier.encoder,
        directory,
        base_model_name_or_path=prepared.model_name,
        task_type="FEATURE_EXTRACTION",
        rank_pattern=record.masks if name == "adalora" else None,
    )
    card = adapter_card(
        _log(prepared, out, name),
        config=json.loads((directory / CONFIG_NAME).read_text()),
        seeds={"split, batches, head and adapters": prepared.start.seed},
        data_fingerprint=prepared.arguments["--data"],
        pattern=record.masks,
        versions=versions(PACKAGES),
        results={} if record.accuracy is None else {"test accuracy": round(record.accuracy, 4)},
    )
    write_card(directory, card)
    head = {name: value.contiguous() for name, value in classifier.head.state_dict().items()}
    write_atomically(directory / HEAD, lambda file: file.write(save(head)))
    _write_labels(directory / LABELS, prepared.labels)
    if not has_peft():
        return Export(name, directory, None, None)
    ours = classifier(batch.input_ids, batch.attention_mask).logits
    theirs = _logits_on_peft(prepared, directory, classifier, batch)
    return Export(name, directory, float((ours - theirs).abs().max()), float(ours.abs().max()))


def _log(prepared: Prepared, out: Path, name: str) -> RunLog | None:
    """What was decided in the training; None where nothing was."""
    path = Store(out, prepared.arguments).decisions(name)
    return read_log(path) if path.is_file() else None


def _logits_on_peft(prepared: Prepared, directory: Path, classifier: TextClassifier, batch: Batch) -> Tensor:
    import peft

    with warnings.catch_warnings():
        # peft looks for AdaLoRA's own rank_pattern among module names, finds none, and applies it all the same.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        encoder: nn.Module = peft.PeftModel.from_pretrained(
            load_encoder(prepared.directory, whole=True), str(directory)
        ).eval()
    hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    logits: Tensor = classifier.head(mean_pool(hidden, batch.attention_mask))
    return logits


def _write_labels(path: Path, labels: Sequence[str]) -> None:
    text = json.dumps(list(labels), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
