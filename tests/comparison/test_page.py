"""What the page of runs holds; tests/comparison/test_page_browser.py looks at it in a browser."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf
from PIL import Image

from modeling.comparison.measure_rows import measure_rows
from modeling.comparison.page import write_page
from modeling.comparison.page_runs import NUM_GRIDS, NUM_POINTS
from modeling.comparison.summaries import read_summaries
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from tests.comparison.runs import LOG_EVERY, noisy

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


class Elements(HTMLParser):
    """The elements of a page, their attributes, and the scripts' texts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.found and self.cdata_elem == "script":
            self.scripts[-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def page(tmp_path):
    """Writes the page of these folders and returns its text."""

    def write(*folders):
        write_page(read_summaries(folders)[0], tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    return write


def data_of(text):
    return json.loads(Elements(text).scripts[0])


def tables_of(text):
    return data_of(text)["tables"]


def draw_grid(folder, step, colour="red"):
    for kind in ("raw", "ema"):
        (folder / "samples" / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(folder / "samples" / kind / f"{step}.png")


def test_a_strange_name_is_text_and_only_the_pages_own_scripts_may_run(write_run, page):
    folder = write_run(noisy(0), HOSTILE.replace("/", ""), wandb__name=HOSTILE)
    draw_grid(folder, 25)
    text = page(folder, write_run(noisy(1), dataset__root=HOSTILE, seed=1, model__name=HOSTILE))
    found = Elements(text)
    assert [image["src"][:11] for image in found.of("img")] == ["data:image/"] * 2
    assert [script.get("type") for script in found.of("script")] == ["application/json", None, None]
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found.scripts[1:]]
    (policy,) = [meta["content"] for meta in found.of("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src ([^;]*)", policy)[1] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert html.escape(HOSTILE, quote=False).split('"')[0] in text
    assert HOSTILE in data_of(text)["labels"][1]
    assert not re.search(r"""(src|href)=["']?(http|//)""", text.replace(found.scripts[1], ""))


def test_the_page_of_twenty_long_runs_is_under_a_megabyte_and_a_half(write_run, page):
    folders = [write_run(noisy(seed, 1000), f"run{seed}", seed=seed) for seed in range(20)]
    more = '{"train/loss_smoothed": 0.123456789, "train/lr": 0.00123456789, "images_per_second": 1234.56789, '
    for folder in folders:
        lines = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(lines.replace("{", more))
    text = page(*folders)
    assert len(text.encode()) < 1_500_000
    lines = tables_of(text)["lines"]
    assert len(lines["step"]) == 20 * NUM_POINTS
    assert (lines["step"][-1], lines["lr"][-1]) == (1000 * LOG_EVERY, 0.0012346)


def test_a_run_that_has_just_begun_is_in_the_page(write_run, page):
    folder = write_run([], is_finished=False)
    assert "<td>stopped</td>" in page(folder)
    assert "its first line comes at step 25" in page(folder)
    (folder / "metrics.jsonl").unlink()
    assert "<td>stopped</td>" in page(folder)
    assert tables_of(page(folder, write_run(noisy(0), "other")))["lines"]["run"][0] == 1


def test_a_damaged_run_is_said_to_be_damaged_with_the_line(write_run, page):
    folder = write_run(noisy(0))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:5], "{}\n", *lines[5:]]))
    text = page(folder)
    assert "<td>damaged</td>" in text
    assert "line 6 is damaged" in text
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"config\.yaml is no YAML of the expected form, or damaged: dataset"):
        page(folder)


def test_a_folder_of_no_run_is_an_error_that_names_it(command, tmp_path):
    arguments = tmp_path, "--html", tmp_path / "report.html"
    assert command(*arguments) == (2, f"{tmp_path}: expected a run's folder, or one with runs in it\n")
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_configuration_hides_no_other_run(write_run, command, tmp_path):
    write_run(noisy(0))
    (write_run(noisy(1), "b") / "config.yaml").write_text("seed: 0\n")
    code, text = command(tmp_path, "--html", tmp_path / "report.html")
    assert (code, "b/config.yaml is no YAML of the expected form" in text) == (0, True)
    assert "finished" in (tmp_path / "report.html").read_text()


def test_what_differs_comes_first_and_is_marked_against_the_first_run(write_run, page):
    text = page(write_run(noisy(0)), write_run(noisy(1), "b", optimizer__lr=0.5, runtime__device="cpu"))
    header, first, second = re.findall(r"<tr>.*?</tr>", text, re.DOTALL)[:3]
    assert re.findall(r"<small.*?</small><br>(\w+)", header) == ["lr"]  # not the device, which changes no curve
    assert 'class="differs"' not in first
    assert '<td class="differs">0.5</td>' in second
    assert re.search(r'<th scope="row">runtime.device</th><td[^>]*>auto</td><td[^>]*class="differs">cpu</td>', text)


def test_a_run_is_beside_the_reference_that_is_nearest(write_run, page):
    text = page(write_run(noisy(0), diffusion__num_timesteps=1000))
    band = tables_of(text)["band"]
    assert set(band["name"]) == {"default"}
    bounds = zip(band["low"], band["reference"], band["high"], strict=True)
    assert all(0 < low < middle < high for low, middle, high in bounds)
    text = page(write_run(noisy(0), "other", diffusion__num_timesteps=7))
    assert tables_of(text)["band"] == {}
    assert "no comparable reference" in text


def test_losses_by_timestep_are_those_of_the_run(write_run, page):
    bins = tables_of(page(write_run(noisy(0), linear=0.045)))["bins"]
    assert bins["kind"] == ["ema", "ema", "linear", "linear"]
    assert bins["timesteps"] == ["1-500", "501-1000"] * 2
    assert bins["t"] == [0.2505, 0.7505] * 2
    assert bins["loss"] == [0.0665, 0.0035, 0.0855, 0.0045]


def test_grids_are_thinned_evenly_and_the_last_is_kept(write_run, page):
    folder = write_run(noisy(0))
    for step in range(1, 101):
        draw_grid(folder, step)
    steps = data_of(page(folder))["steps"]
    assert (len(steps), steps[0], steps[-1]) == (NUM_GRIDS, 1, 100)


def test_an_evaluation_is_of_the_run_whose_weights_were_measured(write_run, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, other = write_run(noisy(0)), write_run(noisy(0), "other", seed=1)
    for number, run in enumerate((folder, other)):
        (run / "model.safetensors").write_bytes(b"%d" % number)
    (tmp_path / "evaluation").mkdir()
    identity = {"checkpoint_sha256": sha256_of(folder / "model.safetensors"), "num_images": 500}
    record = {"values": {"encoder/precision": 0.125, "bins": {"1-2": 1.0}}, "identity": {"samples": identity}}
    bits = {"values": {"b": {"total": 4.5}}, "identity": {"checkpoint_sha256": sha256_of(other / "model.safetensors")}}
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"encoder": record, "bits_per_dim": bits}))
    Image.new("RGB", (9, 9)).save(tmp_path / "evaluation" / "neighbours.png")
    text = page(folder)
    assert "0.1250" in text
    assert "nearest training images" in text
    assert "4.5000" not in text
    text = page(other)
    assert "4.5000" in text
    assert "0.1250" not in text
    assert "nearest training images" not in text


def test_a_damaged_evaluation_hides_no_run(write_run, command, tmp_path, monkeypatch):
    write_run(noisy(0), "runs/a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{")
    code, text = command()
    assert (code, "evaluation.json is no JSON of the expected form" in text, "finished" in text) == (0, True, True)


def test_only_numbers_of_one_identity_share_a_row_and_the_best_is_marked():
    def measured(model, **values):
        return [("fid", {"values": values, "identity": {"samples": {"checkpoint_sha256": model}, "num_images": 10}})]

    first, second = measured("a", fid=9.0, precision=0.5), measured("b", fid=8.0, precision=0.25)
    rows = measure_rows([first, second])
    assert [[cell["is_best"] for cell in row["cells"].values()] for row in rows] == [[False, True], [True, False]]
    second[0][1]["identity"]["num_images"] = 20
    rows = measure_rows([first, second])
    assert [list(row["cells"]) for row in rows] == [[0], [0], [1], [1]]
    assert not any(cell["is_best"] for row in rows for cell in row["cells"].values())


def test_the_command_of_a_run_is_in_the_page(write_run, page):
    config = OmegaConf.load(write_run(noisy(0), seed=7) / "config.yaml")
    assert config.seed == 7
    text = html.unescape(page(write_run(noisy(0), "again", seed=7)))
    assert re.search(r"<code>python main.py dataset.num_images=80000 .*seed=7.*</code>", text)
