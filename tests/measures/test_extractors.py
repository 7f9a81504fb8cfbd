"""Extractors: torch-fidelity's Inception to the digit, and safe with any file and any server."""

import contextlib
import io
import pickle
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.utils import create_feature_extractor

from modeling.measures import extractors
from modeling.measures.distances import measure_distances
from modeling.measures.extractors import load_inception
from modeling.measures.features import extract_features
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from tests.helpers import Payload, random_images

pytestmark = pytest.mark.numeric

IMAGES, OTHERS = random_images(10, 3, 32, 32), random_images(12, 3, 32, 32, seed=1) // 2


class Blank(inception.FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with its initial weights."""

    def load_state_dict(self, *arguments, **options):
        pass


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    torch.save(Blank("blank", ["2048"], feature_extractor_weights_path=empty).state_dict(), path)
    return path


@pytest.mark.long
@pytest.mark.slow
def test_inceptions_features_are_those_of_torch_fidelity(inception_weights):
    found = extract_features(load_inception(inception_weights), IMAGES)
    network = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    values, logits = network(IMAGES)
    assert torch.equal(found.values, values)
    assert found.logits is not None
    assert torch.equal(found.logits, logits)
    assert values.shape == (10, 2048)
    assert found.identity["extractor"] == "inception"  # these weights are not the official ones
    assert found.identity["extractor_sha256"] == sha256_of(inception_weights)


@pytest.mark.long
def test_inceptions_numbers_are_those_of_torch_fidelity(inception_weights):
    extractor = load_inception(inception_weights)
    generated, reference = extract_features(extractor, IMAGES), extract_features(extractor, OTHERS)
    found = measure_distances(generated, reference)["values"]
    expected = torch_fidelity.calculate_metrics(
        input1=Images(IMAGES), input2=Images(OTHERS), isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=10, feature_extractor="inception-v3-compat", save_cpu_ram=True,
        feature_extractor_weights_path=str(inception_weights), cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    assert found == pytest.approx(
        {
            "inception/frechet_distance": expected["frechet_inception_distance"],
            "inception/kernel_distance": expected["kernel_inception_distance_mean"],
            "inception/kernel_distance_std": expected["kernel_inception_distance_std"],
            "inception/precision": expected["precision"],
            "inception/recall": expected["recall"],
            "inception/inception_score": expected["inception_score_mean"],
            "inception/inception_score_std": expected["inception_score_std"],
        },
        rel=1e-4,
        abs=1e-6,
    )


class Images(torch.utils.data.TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0]


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_weights_that_carry_code_are_rejected_and_nothing_runs(tmp_path, write):
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    write({"fc.bias": torch.zeros(1008), "code": Payload(canary)}, path)
    with pytest.raises(UserError, match=f"inception_weights={path} is no file of weights, or damaged"):
        load_inception(path)
    assert not canary.exists()
    if write is torch.save:  # what torch-fidelity alone would do
        with pytest.raises(RuntimeError):
            inception.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
        assert canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not torch-fidelity's Inception"),
        ({"fc.bias": torch.zeros(3)}, "not torch-fidelity's Inception"),
        ([1, 2], "holds more than named tensors"),
        ({"fc.bias": "zero"}, "holds more than named tensors"),
        (torch.zeros(3), "holds more than named tensors"),
    ],
)
def test_another_networks_weights_are_rejected(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"inception_weights=.*weights.pth.* {message}"):
        load_inception(tmp_path / "weights.pth")


def test_missing_weights_are_named_with_their_address(tmp_path):
    with pytest.raises(UserError, match=r"inception_weights=.*missing.pth: there is no such file.*https://github"):
        load_inception(tmp_path / "missing.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def use_port(monkeypatch, port: int) -> str:
    url = f"http://127.0.0.1:{port}/weights.pth"
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", url)
    monkeypatch.setenv("no_proxy", "*")
    return url


def test_without_a_network_the_error_names_address_key_and_remedy(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        url = use_port(monkeypatch, free.getsockname()[1])
        with pytest.raises(UserError, match=f"inception_weights=null, and {url} .*: set inception_weights to"):
            load_inception()
    assert not list(hub.iterdir())


def test_a_silent_server_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(extractors, "_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_port(monkeypatch, silent.getsockname()[1])
        with pytest.raises(UserError, match="cannot be downloaded .*timed out"):
            load_inception()
    assert socket.getdefaulttimeout() is None


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder: Path):
    """Serves a folder's files; gives the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_download_that_is_not_the_official_file_is_not_kept(hub, monkeypatch, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "weights.pth").write_bytes(b"anything")
    with served(folder) as port:
        use_port(monkeypatch, port)
        with pytest.raises(UserError, match="invalid hash value"):
            load_inception()
    assert not list(hub.iterdir())


@pytest.mark.slow
def test_the_official_file_is_downloaded_once(hub, monkeypatch, inception_weights):
    monkeypatch.setattr(extractors, "OFFICIAL_SHA256", sha256_of(inception_weights)[:8])  # the real one has 95 MB, too
    with served(inception_weights.parent) as port:
        use_port(monkeypatch, port)
        first = load_inception()
    again = load_inception()  # without a server
    assert first.sha256 == again.sha256 == sha256_of(inception_weights)
    assert first.name == again.name == "inception-2015"
    assert [path.name for path in hub.iterdir()] == ["weights.pth"]


def test_a_wrong_file_under_the_official_name_is_rejected(hub, monkeypatch):
    use_port(monkeypatch, 9)
    hub.mkdir(parents=True)
    (hub / "weights.pth").write_bytes(b"anything")
    with pytest.raises(UserError, match="is not http.*its SHA-256 differs: delete it"):
        load_inception()
