"""Distances in features: right where the answer is known, called FID only where they are, safe with any file."""

import contextlib
import io
import pickle
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.utils import create_feature_extractor

from modeling import features
from modeling.images import to_model_range
from modeling.measures.encoder import Encoder, images_sha256, load_encoder, save_encoder
from modeling.measures.features import (
    Features,
    WeightsError,
    extract_features,
    frechet_distance,
    load_inception,
    load_own_encoder,
    measure_distances,
    name_values,
)
from modeling.system.files import sha256_of

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)
OTHERS = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR) // 2


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    save_encoder(path, Encoder(8), {})
    return path


class Blank(inception.FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with the weights it is born with."""

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


def whitened(count: int, dimensions: int) -> torch.Tensor:
    """Points whose mean is 0 and whose covariance is the identity, both exactly."""
    points = torch.randn(count, dimensions, dtype=torch.float64)
    points -= points.mean(dim=0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T


def as_features(values: torch.Tensor, extractor: str = "encoder", logits: torch.Tensor | None = None) -> Features:
    identity = {
        "num_images": len(values),
        "images_sha256": f"of {len(values)} images",
        "extractor": extractor,
        "extractor_sha256": "of the weights",
        "torch_fidelity": version("torch-fidelity"),
    }
    return Features(values, logits, identity)


# ---- the distances


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    mean, first, second = torch.randn(6).double(), torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    left, right = whitened(50, 6) * first @ rotation, (mean + whitened(80, 6) * second) @ rotation
    expected = mean.square().sum() + (first - second).square().sum()
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_gaussians_in_general_position_is_the_closed_form():
    first, second = torch.randn(5, 5).double(), torch.randn(5, 5).double()
    covariances = first.T @ first, second.T @ second
    # tr (S_1 S_2)^(1/2) is the sum of the singular values of S_1^(1/2) S_2^(1/2), whatever the roots
    root = torch.linalg.svdvals(first @ second.T).sum()
    expected = covariances[0].trace() + covariances[1].trace() - 2 * root
    assert frechet_distance(whitened(40, 5) @ first, whitened(40, 5) @ second) == pytest.approx(
        expected.item(), rel=1e-9
    )


def test_a_set_is_at_no_distance_from_itself():
    values = measure_distances(as_features(whitened(40, 4).float()), as_features(whitened(40, 4).float()))["values"]
    assert values["encoder/frechet_distance"] == pytest.approx(0, abs=1e-5)  # of two with equal mean and covariance
    same = as_features(torch.randn(40, 4))
    values = measure_distances(same, same)["values"]
    assert values["encoder/precision"] == values["encoder/recall"] == 1


def test_samples_of_half_of_the_reference_have_precision_one_and_recall_one_half():
    near, far = torch.randn(20, 3) * 0.01, torch.randn(20, 3) * 0.01 + 100
    values = measure_distances(as_features(near), as_features(torch.cat([near, far])))["values"]
    assert (values["encoder/precision"], values["encoder/recall"]) == (1.0, 0.5)


def test_the_kernel_distance_of_points_is_the_closed_form():
    """All points of a set equal: every subset has the same kernel values, (x.y / D + 1)^3."""
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    values = measure_distances(as_features(one.expand(12, 2)), as_features(two.expand(15, 2)))["values"]
    expected = 1.5**3 + 3.5**3 - 2 * 1.5**3
    assert values["encoder/kernel_distance"] == pytest.approx(expected, rel=1e-6)
    assert values["encoder/kernel_distance_std"] == pytest.approx(0, abs=1e-5)


def test_the_inception_score_of_images_that_are_all_alike_is_one():
    alike = as_features(torch.randn(20, 3), "inception-2015", logits=torch.randn(7).expand(20, 7))
    values = measure_distances(alike, as_features(torch.randn(20, 3), "inception-2015"))["values"]
    assert values["inception-2015/inception_score"] == pytest.approx(1)


NAMES = ["frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall", "inception_score"]


@pytest.mark.parametrize(
    ("extractor", "counts", "names"),
    [
        ("inception-2015", (50_000, 50_000), ["fid", "kid", "kid_std", "precision", "recall", "inception_score"]),
        ("inception-2015", (5_000, 50_000), [f"inception-2015/{name}" for name in NAMES]),
        ("inception-2015", (50_000, 10_000), [f"inception-2015/{name}" for name in NAMES]),
        ("inception", (50_000, 50_000), [f"inception/{name}" for name in NAMES]),
        ("encoder", (50_000, 50_000), [f"encoder/{name}" for name in NAMES]),
    ],
)
def test_only_50000_images_with_the_official_weights_have_a_fid(extractor, counts, names):
    assert list(name_values(dict.fromkeys(NAMES, 1.0), extractor, *counts)) == names


def test_without_logits_there_is_no_inception_score():
    features, logits = as_features(torch.randn(20, 3), "inception"), torch.randn(20, 7)
    assert "inception/inception_score" not in measure_distances(features, features)["values"]
    generated = as_features(torch.randn(20, 3), "inception", logits=logits)
    assert "inception/inception_score" in measure_distances(generated, features)["values"]


def test_features_of_two_extractors_are_not_compared():
    first = as_features(torch.randn(20, 3))
    other = replace(first, identity=first.identity | {"extractor_sha256": "another"})
    with pytest.raises(ValueError, match="extractor_sha256 must be one for both, got of the weights and another"):
        measure_distances(first, other)


# ---- the encoder's features


def test_every_number_has_its_identity(encoder_path):
    extractor = load_own_encoder(encoder_path)
    result = measure_distances(extract_features(extractor, IMAGES), extract_features(extractor, OTHERS))
    assert result["identity"] == {
        "num_images": 24,
        "images_sha256": images_sha256(IMAGES),
        "reference_num_images": 30,
        "reference_sha256": images_sha256(OTHERS),
        "extractor": "encoder",
        "extractor_sha256": sha256_of(encoder_path),
        "torch_fidelity": torch_fidelity.__version__,
        "kid_subsets": 100,
        "kid_subset_size": 24,
        "prc_neighborhood": 3,
    }
    assert set(result["values"]) == {
        f"encoder/{name}"
        for name in ("frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall")
    }


def test_the_encoders_features_are_its_own_whatever_the_batch_size(encoder_path):
    found = extract_features(load_own_encoder(encoder_path), IMAGES, batch_size=7)
    encoder, _ = load_encoder(encoder_path)
    torch.testing.assert_close(found.values, encoder.features(to_model_range(IMAGES)))
    assert found.logits is None


def test_features_are_computed_once_and_kept(encoder_path, tmp_path):
    extractor = load_own_encoder(encoder_path)
    first = extract_features(extractor, IMAGES, cache=tmp_path)
    assert torch.equal(first.values, extract_features(extractor, IMAGES).values)

    def fail(images):
        raise AssertionError("computed again")

    unable = replace(extractor, function=fail)
    again = extract_features(unable, IMAGES, cache=tmp_path)
    assert torch.equal(again.values, first.values)
    assert again.identity == first.identity
    for changed, images in ((unable, IMAGES.flip(0)), (replace(unable, sha256="other"), IMAGES), (unable, IMAGES[:12])):
        with pytest.raises(AssertionError, match="computed again"):
            extract_features(changed, images, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_of_kept_features_is_named(encoder_path, tmp_path):
    extractor = load_own_encoder(encoder_path)
    extract_features(extractor, IMAGES, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[:-100], bytes(flipped), b"", b"anything"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged .*: delete it"):
            extract_features(extractor, IMAGES, cache=tmp_path)


@pytest.mark.parametrize(
    "images", [IMAGES.float(), IMAGES[:9], IMAGES[:, :1], IMAGES[0]], ids=["float", "too few", "grey", "one"]
)
def test_what_are_no_images_is_refused_before_anything_is_computed(encoder_path, images):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, 3, H, W\) with N at least 10, got"):
        extract_features(load_own_encoder(encoder_path), images)


def test_features_that_are_not_finite_are_refused_and_not_kept(encoder_path, tmp_path):
    broken = replace(load_own_encoder(encoder_path), function=lambda images: (images.flatten(1) / 0.0, None))
    with pytest.raises(ValueError, match="not finite"):
        extract_features(broken, IMAGES, cache=tmp_path)
    assert not list(tmp_path.iterdir())


# ---- Inception


@pytest.mark.slow
def test_inceptions_features_are_those_of_torch_fidelity(inception_weights):
    found = extract_features(load_inception(inception_weights), IMAGES[:10])
    network = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    values, logits = network(IMAGES[:10])
    assert torch.equal(found.values, values)
    assert torch.equal(found.logits, logits)
    assert values.shape == (10, 2048)
    assert found.identity["extractor"] == "inception"  # these weights are not the official ones
    assert found.identity["extractor_sha256"] == sha256_of(inception_weights)


@pytest.mark.long
def test_inceptions_numbers_are_those_of_torch_fidelity(inception_weights):
    extractor = load_inception(inception_weights)
    generated, reference = extract_features(extractor, IMAGES[:10]), extract_features(extractor, OTHERS[:12])
    found = measure_distances(generated, reference)["values"]
    expected = torch_fidelity.calculate_metrics(
        input1=Images(IMAGES[:10]), input2=Images(OTHERS[:12]), isc=True, fid=True, kid=True, prc=True,
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


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_weights_that_carry_code_are_refused_and_nothing_runs(tmp_path, write):
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    write({"fc.bias": torch.zeros(1008), "code": Canary(canary)}, path)
    with pytest.raises(WeightsError, match=f"inception_weights={path} is no file of weights, or damaged"):
        load_inception(path)
    assert not canary.exists()
    if write is torch.save:  # what torch-fidelity alone would do
        with pytest.raises(RuntimeError):
            inception.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
        assert canary.exists()


@pytest.mark.parametrize("content", [{}, {"fc.bias": torch.zeros(3)}, [1, 2], {"fc.bias": "zero"}, torch.zeros(3)])
def test_another_networks_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="not torch-fidelity's Inception"):
        load_inception(tmp_path / "weights.pth")


def test_weights_that_are_not_there_are_named_with_the_address(tmp_path):
    with pytest.raises(WeightsError, match=r"inception_weights=.*missing.pth: there is no such file.*https://github"):
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
        with pytest.raises(WeightsError, match=f"inception_weights=null, and {url} .*: set inception_weights to"):
            load_inception()
    assert not list(hub.iterdir())


def test_a_server_that_does_not_answer_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(features, "_TIMEOUT_SECONDS", 0.2)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_port(monkeypatch, silent.getsockname()[1])
        with pytest.raises(WeightsError, match="cannot be downloaded .*timed out"):
            load_inception()
    assert time.monotonic() - start < 5
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
        with pytest.raises(WeightsError, match="invalid hash value"):
            load_inception()
    assert not list(hub.iterdir())


@pytest.mark.slow
def test_the_official_file_is_downloaded_once(hub, monkeypatch, inception_weights):
    monkeypatch.setattr(features, "OFFICIAL_SHA256", sha256_of(inception_weights)[:8])  # the real one has 95 MB as well
    with served(inception_weights.parent) as port:
        use_port(monkeypatch, port)
        first = load_inception()
    again = load_inception()  # nobody serves it any more
    assert first.sha256 == again.sha256 == sha256_of(inception_weights)
    assert first.name == again.name == "inception-2015"
    assert [path.name for path in hub.iterdir()] == ["weights.pth"]


def test_what_lies_in_the_place_of_the_official_file_is_checked_too(hub, monkeypatch):
    use_port(monkeypatch, 9)
    hub.mkdir(parents=True)
    (hub / "weights.pth").write_bytes(b"anything")
    with pytest.raises(WeightsError, match="is not http.*which it was taken for: delete it"):
        load_inception()
