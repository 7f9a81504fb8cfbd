"""Fixtures: folders of runs, and `report.py` as a command."""

import json
import sys

import pytest
from omegaconf import OmegaConf

import report
from modeling.system.files import write_json
from tests.comparison.runs import BATCH_SIZE, LOG_EVERY, NUM_LINES
from tests.helpers import ROOT


@pytest.fixture
def write_run(tmp_path):
    """Writes a run's folder: its configuration, a line for each loss (None: all steps skipped), and its metrics."""

    def write(losses, name="run", *, is_finished=True, heldout=0.035, linear=None, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = OmegaConf.load(ROOT / "params.yaml")
        config.train.update({"log_every": LOG_EVERY, "batch_size": BATCH_SIZE, "num_epochs": 2, "max_steps": None})
        config.dataset.root = str(tmp_path)  # there is no data: the length comes from num_images
        config.dataset.num_images = NUM_LINES * LOG_EVERY * BATCH_SIZE // 2
        for key, value in changes.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        OmegaConf.save(config, folder / "config.yaml")
        rows, skipped = [], 0
        for number, loss in enumerate(losses, start=1):
            skipped += LOG_EVERY if loss is None else 0
            loss = None if loss is None else float(loss)
            row = {"step": number * LOG_EVERY, "train/loss": loss, "train/skipped": skipped, "seconds": number}
            rows.append(json.dumps(row) + "\n")
        (folder / "metrics.jsonl").write_text("".join(rows))
        steps = len(losses) * LOG_EVERY
        details = {
            "bins": {"eval/heldout_ema": {"1-500": 1.9 * heldout, "501-1000": 0.1 * heldout}},
            "data_sha256": "0", "code_sha256": "0",
            "device": "x86_64", "threads": 2, "precision": "fp32", "torch": "2.15.0",
        }  # fmt: skip
        metrics = {
            "eval/heldout_ema": heldout,
            "steps": steps, "images": steps * config.train.batch_size, "seconds": len(losses), "parameters": 1,
            "images_per_second": LOG_EVERY * config.train.batch_size,
        }  # fmt: skip
        if linear is not None:  # an older run does not know it
            metrics["eval/heldout_linear"] = linear
            details["bins"]["eval/heldout_linear"] = {"1-500": 1.9 * linear, "501-1000": 0.1 * linear}
        if is_finished:
            write_json(folder / "details.json", details)
            write_json(folder / "metrics.json", metrics)
        return folder

    return write


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `report.py` with its references in a folder of its own; returns the exit code and what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments), "--references", str(tmp_path / "refs")])
        try:
            code = report.main()
        except SystemExit as ended:
            code = ended.code
        return code, "".join(capsys.readouterr())

    return call
