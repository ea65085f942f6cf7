"""TransUNet against the published architecture, which transunet_reference.py writes a second time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from transunet_reference import google_file, published_shapes, randomise, reference
from ultrarefiner.errors import UserError
from ultrarefiner.models.transunet import TransUNet, TransUNetConfig
from ultrarefiner.models.transunet_weights import google_state

# A small network of the published shape: three ResNet stages, all kinds of units, four decoder blocks.
SMALL = TransUNetConfig(
    hidden=24,
    layers=2,
    heads=3,
    mlp=32,
    resnet_units=(2, 1, 2),
    resnet_width=4,
    resnet_groups=2,
    head_channels=16,
    decoder_channels=(12, 8, 6, 4),
)
SMALL_VIT = replace(SMALL, resnet_units=())
R50 = (3, 4, 9)


@pytest.mark.parametrize(
    ("name", "units", "n_skip"), [pytest.param("R50-ViT-B_16", R50, 3, marks=pytest.mark.slow), ("ViT-B_16", (), 0)]
)
def test_equals_the_published_architecture(name, units, n_skip, tmp_path):
    """Through a file: trained at 224, it also fits 256, with the position embeddings that scipy would resample."""
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        if len(shape) > 1
        else torch.rand(shape, generator=generator) + 0.5
        for key, shape in published_shapes(768, 12, 3072, tokens=14**2, units=units).items()
    }
    positions = "transformer.embeddings.position_embeddings"
    state[positions] = torch.randn(1, 14**2, 768, generator=generator)
    torch.save(state, tmp_path / "model.pth")
    for image_size in (224, 256):
        with torch.device("meta"):
            model = TransUNet.from_name(name, image_size)
        model.load_official(tmp_path / "model.pth")
        image = torch.rand(1, 1, image_size, image_size, generator=generator)
        zoomed = ndimage.zoom(state[positions].reshape(14, 14, 768), (image_size / 224, image_size / 224, 1), order=1)
        with torch.no_grad():
            fitting = state | {positions: torch.from_numpy(zoomed).reshape(1, -1, 768)}
            expected = reference(fitting, image, heads=12, n_skip=n_skip)
            assert expected.std() > 1e-2
            torch.testing.assert_close(model.eval()(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_skip", [0, 1, 2, 3])
@pytest.mark.parametrize("image_size", [32, 80])
def test_equals_the_published_architecture_with_fewer_skips(n_skip, image_size):
    model = randomise(TransUNet(SMALL, image_size, num_classes=3, n_skip=n_skip))
    image = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = reference(model.state_dict(), image, heads=3, n_skip=n_skip, groups=2)
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "mlp", "units", "keys", "parameters"),
    [
        ("R50-ViT-B_16", 768, 12, 3072, R50, 409, 105_276_066),
        ("R50-ViT-L_16", 1024, 24, 4096, R50, 601, 324_023_714),
        ("ViT-B_16", 768, 12, 3072, (), 253, 91_673_186),
        ("ViT-L_16", 1024, 24, 4096, (), 445, 310_355_298),
    ],
)
def test_state_dict_is_the_published_one(name, hidden, layers, mlp, units, keys, parameters):
    with torch.device("meta"):
        model = TransUNet.from_name(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == published_shapes(hidden, layers, mlp, tokens=14**2, units=units)
    assert len(shapes) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_load_official(tmp_path, wrap):
    source, target = randomise(TransUNet(SMALL, 48)), TransUNet(SMALL, 48).eval()
    torch.save(wrap(source.state_dict()), tmp_path / "model.pth")
    target.load_official(tmp_path / "model.pth")
    image = torch.rand(1, 1, 48, 48)
    with torch.no_grad():
        assert torch.equal(source(image), target(image))


def test_load_official_resamples_position_embeddings(tmp_path):
    source, target = randomise(TransUNet(SMALL, 48)), TransUNet(SMALL, 80)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    target.load_official(tmp_path / "model.pth")
    grid = source.transformer.embeddings.position_embeddings.detach().numpy().reshape(3, 3, 24)
    expected = ndimage.zoom(grid, (5 / 3, 5 / 3, 1), order=1).reshape(1, 25, 24)
    np.testing.assert_allclose(target.transformer.embeddings.position_embeddings.detach(), expected, atol=1e-6)


def spoil_official(state):
    head, norm = "segmentation_head.0.bias", "transformer.encoder.encoder_norm.weight"
    return {
        "missing: segmentation_head.0.bias": {key: value for key, value in state.items() if key != head},
        "left over: classifier.bias": state | {"classifier.bias": torch.zeros(2)},
        r"segmentation_head.0.bias \(9,\) instead of \(2,\)": state | {head: torch.zeros(9)},
        "NaN or infinite weights in 'transformer.encoder.encoder_norm.weight'": state | {norm: state[norm] * torch.nan},
        "has 7 position embeddings": state | {"transformer.embeddings.position_embeddings": torch.zeros(1, 7, 24)},
        r"position_embeddings \(1, 9, 8\) instead": state
        | {"transformer.embeddings.position_embeddings": torch.zeros(1, 9, 8)},
        "holds no weights": {"model": 3},
        "missing: .* and 1[0-9]+ more; left over: a": {"a": torch.zeros(1)},
    }


@pytest.mark.parametrize("message", spoil_official({"transformer.encoder.encoder_norm.weight": torch.ones(1)}))
def test_load_official_names_what_does_not_fit(tmp_path, message):
    model = TransUNet(SMALL, 48)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(spoil_official(randomise(TransUNet(SMALL, 48)).state_dict())[message], tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        model.load_official(tmp_path / "model.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class _Arbitrary:
    pass


def test_load_official_refuses_unreadable_files(tmp_path):
    model, path = TransUNet(SMALL, 48), tmp_path / "model.pth"
    with pytest.raises(UserError, match=r"model.pth does not exist"):
        model.load_official(path)
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"truncated or damaged|no checkpoint of plain tensors"):
            model.load_official(path)
    torch.save({"model": model.state_dict(), "args": _Arbitrary()}, path)
    with pytest.raises(UserError, match="holds code that unpickling would run"):
        model.load_official(path)


# --------------------------------------------------------------------------------------------------- Google's files


def small_google_file(config=SMALL, grid=3):
    return google_file(config.hidden, config.heads, config.layers, config.mlp, grid, config.resnet_units, 4)


def test_every_key_of_the_real_file_is_taken(tmp_path):
    np.savez_compressed(tmp_path / "google.npz", **google_file(768, 12, 12, 3072, 14, R50, fill=np.zeros))
    for image_size in (224, 256):
        with torch.device("meta"):
            transformer = TransUNet.from_name("R50-ViT-B_16", image_size).transformer
        state = google_state(tmp_path / "google.npz", transformer, heads=12)
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in transformer.state_dict().items()
        }


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT])
def test_load_npz_puts_each_value_in_its_place(tmp_path, config):
    arrays = small_google_file(config)
    np.savez(tmp_path / "google.npz", **arrays)
    model = TransUNet(config, 48)
    model.load_npz(str(tmp_path / "google.npz"))
    state = {key: value.numpy() for key, value in model.transformer.state_dict().items()}

    def conv(name):
        return np.einsum("yxio->oiyx", arrays[name + "/kernel"])

    expected = {
        "embeddings.patch_embeddings.weight": conv("embedding"),
        "embeddings.patch_embeddings.bias": arrays["embedding/bias"],
        "embeddings.position_embeddings": arrays["Transformer/posembed_input/pos_embedding"][:, 1:],
        "encoder.encoder_norm.weight": arrays["Transformer/encoder_norm/scale"],
        "encoder.encoder_norm.bias": arrays["Transformer/encoder_norm/bias"],
    }
    for i in range(2):
        ours, theirs = f"encoder.layer.{i}.", f"Transformer/encoderblock_{i}/"
        for name in ("query", "key", "value", "out"):
            key = f"{theirs}MultiHeadDotProductAttention_1/{name}"
            order = "ihd->hdi" if name != "out" else "hdi->ihd"
            expected[f"{ours}attn.{name}.weight"] = np.einsum(order, arrays[key + "/kernel"]).reshape(24, 24)
            expected[f"{ours}attn.{name}.bias"] = arrays[key + "/bias"].reshape(24)
        for mine, dense in (("ffn.fc1", "MlpBlock_3/Dense_0"), ("ffn.fc2", "MlpBlock_3/Dense_1")):
            expected[f"{ours}{mine}.weight"] = arrays[f"{theirs}{dense}/kernel"].T
            expected[f"{ours}{mine}.bias"] = arrays[f"{theirs}{dense}/bias"]
        for mine, norm in (("attention_norm", "LayerNorm_0"), ("ffn_norm", "LayerNorm_2")):
            expected[f"{ours}{mine}.weight"] = arrays[f"{theirs}{norm}/scale"]
            expected[f"{ours}{mine}.bias"] = arrays[f"{theirs}{norm}/bias"]
    if config.resnet_units:
        units = ["block1/unit1", "block1/unit2", "block2/unit1", "block3/unit1", "block3/unit2"]
        pairs = [("root.conv", "conv_root"), ("root.gn", "gn_root")]
        for unit in units:
            mine = "body." + unit.replace("/", ".")
            names = [(f"{kind}{k}", f"{kind}{k}") for kind in ("conv", "gn") for k in (1, 2, 3)]
            names += [("downsample", "conv_proj"), ("gn_proj", "gn_proj")] if unit.endswith("unit1") else []
            pairs += [(f"{mine}.{ours}", f"{unit}/{theirs}") for ours, theirs in names]
        for ours, theirs in pairs:
            ours = f"embeddings.hybrid_model.{ours}"
            if f"{theirs}/kernel" in arrays:
                expected[ours + ".weight"] = conv(theirs)
            else:
                expected[ours + ".weight"] = arrays[theirs + "/scale"].reshape(-1)
                expected[ours + ".bias"] = arrays[theirs + "/bias"].reshape(-1)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value, err_msg=key)


def test_load_npz_resamples_position_embeddings(tmp_path):
    arrays = small_google_file(grid=4)
    np.savez(tmp_path / "google.npz", **arrays)
    model = TransUNet(SMALL, 112)
    model.load_npz(tmp_path / "google.npz")
    grid = arrays["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(4, 4, 24)
    expected = ndimage.zoom(grid, (7 / 4, 7 / 4, 1), order=1).reshape(1, 49, 24)
    np.testing.assert_allclose(model.transformer.embeddings.position_embeddings.detach(), expected, atol=1e-5)


def spoil_google(arrays):
    key = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
    return {
        "misses block2/unit1/conv2/kernel": {k: v for k, v in arrays.items() if k != "block2/unit1/conv2/kernel"},
        "has block1/unit3/gn1/bias left over": arrays | {"block1/unit3/gn1/bias": np.zeros(4, np.float32)},
        r"query/kernel of shape \(24, 4, 6\) instead of \(24, 3, 8\)": arrays | {key: np.zeros((24, 4, 6), np.float32)},
        "NaN or infinite weights in Transformer/encoderblock_1": arrays | {key: np.full((24, 3, 8), np.nan)},
        "cannot be read as a NumPy": {"cls": np.array([object()])},
    }


@pytest.mark.parametrize("message", spoil_google({}))
def test_load_npz_names_what_does_not_fit(tmp_path, message):
    np.savez(tmp_path / "google.npz", **spoil_google(small_google_file())[message])
    with pytest.raises(UserError, match=message):
        TransUNet(SMALL, 48).load_npz(tmp_path / "google.npz")


def test_load_npz_refuses_the_file_of_another_model_and_unreadable_ones(tmp_path):
    path = tmp_path / "google.npz"
    np.savez(path, **small_google_file(SMALL))
    with pytest.raises(UserError, match="embedding/kernel of shape"):
        TransUNet(SMALL_VIT, 48).load_npz(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as a NumPy \.npz"):
            TransUNet(SMALL, 48).load_npz(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"cannot be read as a NumPy \.npz"):
        TransUNet(SMALL, 48).load_npz(tmp_path / "array.npy")
    with pytest.raises(UserError, match="does not exist"):
        TransUNet(SMALL, 48).load_npz(tmp_path / "absent.npz")


# --------------------------------------------------------------------------------------------- building and calling


@pytest.mark.parametrize(("name", "image_size", "limit"), [("lite", 224, 4e6), ("tiny", 64, 6e5)])
def test_small_configurations_run_and_gradients_reach_every_parameter(name, image_size, limit):
    model = TransUNet.from_name(name, image_size, num_classes=3)
    assert sum(parameter.numel() for parameter in model.parameters()) < limit
    image = torch.rand(2, 1, image_size, image_size, requires_grad=True)
    logits = model(image)
    assert logits.shape == (2, 3, image_size, image_size)
    F.cross_entropy(logits, torch.randint(3, (2, image_size, image_size))).backward()
    assert image.grad.abs().sum() > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A key's bias shifts all scores of a query alike, which softmax ignores.
        assert parameter.grad.abs().max() > 0 or key.endswith("attn.key.bias"), key


def test_tiny_sees_at_least_8x8_tokens():
    assert TransUNet.from_name("tiny", 64).transformer.embeddings.position_embeddings.shape[1] >= 8**2


def test_one_channel_is_repeated_to_three():
    model = randomise(TransUNet(SMALL, 32))
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image), model(image.repeat(1, 3, 1, 1)))


def test_dropout_acts_in_training_only_and_follows_the_configuration():
    image = torch.rand(1, 1, 32, 32)
    for rates, differs in (((0.1, 0.0), True), ((0.0, 0.5), True), ((0.0, 0.0), False)):
        model = TransUNet(replace(SMALL, dropout=rates[0], attention_dropout=rates[1]), 32)
        tokens = [model.transformer(image.repeat(1, 3, 1, 1))[0] for _ in range(2)]
        assert torch.equal(*tokens) is not differs
        model.eval()
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "R50-ViT-XL"}, "R50-ViT-XL.*R50-ViT-B_16.*lite, tiny"),
        ({"name": "tiny", "image_size": 60}, "image_size=60 .* patch size 8; take 56 or 64"),
        ({"name": "lite", "image_size": 0}, "take 16 or 32"),
        ({"name": "tiny", "num_classes": 0}, "num_classes=0"),
        ({"name": "lite", "n_skip": 4}, "n_skip=4 .* 3 skips"),
        ({"name": "ViT-B_16", "n_skip": 1}, "n_skip=1 .* 0 skips"),
    ],
)
def test_from_name_refuses_what_does_not_fit(arguments, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        TransUNet.from_name(**arguments)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 1, 32, 48), (1, 2, 32, 32)])
def test_forward_refuses_other_images(shape):
    with pytest.raises(UserError, match="built for images of 1 or 3 channels and 32×32 pixels"):
        TransUNet(SMALL, 32)(torch.zeros(shape))
