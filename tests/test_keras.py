"""LoRA in Keras: equal to ours to 1e-5, on whichever backend Keras runs; and what Keras's own `enable_lora` does.

Skipped where Keras is missing. `.ci/keras` runs this file with TensorFlow.
"""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install 'lora-lab[keras]'", allow_module_level=True)

import lora_lab
from lora_lab.zoo import keras_lora

keras = keras_lora.keras
TOLERANCE = 1e-5  # two frameworks' float32 sums of 64 products, outputs of a few units


def torch_layer(d_in=64, d_out=10, r=4, alpha=8.0, **options):
    torch.manual_seed(0)
    layer = lora_lab.LoRALinear(nn.Linear(d_in, d_out, bias=options.pop("bias", True)), r=r, alpha=alpha, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def oracle(layer, x):
    """In float64, from the formula: x W0ᵀ + b + scaling (x Aᵀ) Bᵀ."""
    W, A, B = (t.detach().double().numpy() for t in (layer.base_layer.weight, layer.lora_A, layer.lora_B))
    b = 0 if layer.base_layer.bias is None else layer.base_layer.bias.detach().double().numpy()
    scaling = layer.alpha / (np.sqrt(layer.r) if layer.rslora else layer.r)
    return x @ W.T + b + scaling * (x @ A.T) @ B.T


def numbers(tensor):
    return keras.ops.convert_to_numpy(tensor)


def inputs(n=5, d_in=64):
    return np.random.default_rng(0).normal(size=(n, d_in)).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"rslora": True}, {"d_in": 16, "d_out": 16, "r": 3, "alpha": 5.0}], ids=str)
@pytest.mark.parametrize("make", [keras_lora.dense_from_torch, keras_lora.layer_from_torch], ids=lambda f: f.__name__)
def test_outputs_equal_ours(make, options):
    layer = torch_layer(**options)
    x = inputs(d_in=layer.lora_A.shape[1])
    expected = oracle(layer, x.astype(np.float64))
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, atol=TOLERANCE)
    np.testing.assert_allclose(numbers(make(layer)(x)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("make", [keras_lora.dense_from_torch, keras_lora.layer_from_torch], ids=lambda f: f.__name__)
def test_only_the_factors_train(make):
    assert sorted(tuple(w.shape) for w in make(torch_layer()).trainable_weights) == [(4, 10), (64, 4)]


def test_a_merged_torch_layer_is_not_counted_twice():
    layer = torch_layer()
    expected = oracle(layer, inputs().astype(np.float64))
    layer.merge()
    np.testing.assert_allclose(numbers(keras_lora.layer_from_torch(layer)(inputs())), expected, atol=TOLERANCE)


def dense_of(d_in=6, d_out=5, **options):
    dense = keras.layers.Dense(d_out, **options)
    dense.build((None, d_in))
    return dense


def test_the_update_is_inside_the_activation():
    layer = keras_lora.LoRADense(dense_of(activation="relu"), rank=2, alpha=3.0)
    x = inputs(7, 6)
    plain = numbers(layer.base(x))
    np.testing.assert_allclose(numbers(layer(x)), plain, atol=1e-6)  # B is zero: the base itself
    A, B = np.random.default_rng(1).normal(size=(6, 2)), np.random.default_rng(2).normal(size=(2, 5))
    layer.lora_A.assign(A)
    layer.lora_B.assign(B)
    kernel, bias = numbers(layer.base.kernel), numbers(layer.base.bias)
    np.testing.assert_allclose(numbers(layer(x)), np.maximum(x @ kernel + bias + 1.5 * x @ A @ B, 0), atol=TOLERANCE)
    np.testing.assert_allclose(numbers(layer.merged()(x)), numbers(layer(x)), atol=TOLERANCE)


def test_the_articles_example():
    """Dense(768) with LoRA, then Dense(1), on a batch of 4: (4, 1)."""
    model = keras.Sequential([keras.Input((768,)), keras_lora.LoRADense(keras.layers.Dense(768), 32, 64), keras.layers.Dense(1)])
    assert tuple(model(inputs(4, 768)).shape) == (4, 1)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == 32 * (768 + 768) + 768 + 1


def test_it_starts_at_the_base_and_within_one_over_root_in():
    layer = keras_lora.LoRADense(dense_of(64, 10), rank=4)
    layer.build((None, 64))
    A = numbers(layer.lora_A)
    assert not numbers(layer.lora_B).any() and layer.alpha == 4
    assert np.abs(A).max() <= 1 / 8 and np.abs(A).max() > 0.9 / 8  # of 256 uniform draws the largest is in the last tenth


def test_training_moves_the_factors_and_leaves_the_base(tmp_path):
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = keras_lora.model_from_torch(lora_lab.apply_lora(base, r=2, alpha=4, target_modules=["0", "2"]))
    x = inputs(64, 6)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0).astype(int)
    np.testing.assert_allclose(numbers(model(x)), base(torch.from_numpy(x)).detach().numpy(), atol=TOLERANCE)
    before = [numbers(w).copy() for w in model.non_trainable_weights]
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x, y, batch_size=32, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert len(before) == 4 and all(np.array_equal(a, numbers(w)) for a, w in zip(before, model.non_trainable_weights, strict=True))
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(keras.saving.load_model(tmp_path / "model.keras")(x)), numbers(model(x)))


def test_what_it_refuses():
    with pytest.raises(TypeError, match="Dense"):
        keras_lora.LoRADense(keras.layers.Embedding(5, 3), 2)
    with pytest.raises(ValueError, match="at least 1"):
        keras_lora.LoRADense(dense_of(), 0)
    adapted = dense_of()
    adapted.enable_lora(2)
    with pytest.raises(ValueError, match="already"):
        keras_lora.LoRADense(adapted, 2)
    with pytest.raises(TypeError, match="Tanh"):
        keras_lora.model_from_torch(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))


# ---- Keras's own, as the file's docstring and the lab describe it


def test_enable_lora_trains_the_bias_and_adds_no_scaling():
    dense = dense_of(64, 10)
    dense.enable_lora(4)
    assert sum(int(np.prod(w.shape)) for w in dense.trainable_weights) == 4 * (64 + 10) + 10
    assert dense.lora_alpha == 4
    a = numbers(dense.lora_kernel_a)
    limit = np.sqrt(6 / 64)
    assert 0.9 * limit < np.abs(a).max() <= limit and not numbers(dense.lora_kernel_b).any()


def test_enable_lora_saves_merged_kernels(tmp_path):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    dense = model.layers[0]
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones((2, 5)))
    kernel, x = numbers(dense.kernel), inputs(3, 6)
    expected = numbers(model(x))
    model.save_weights(tmp_path / "w.weights.h5")
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    plain.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(numbers(plain.layers[0].kernel), kernel, atol=1e-6)
    np.testing.assert_allclose(numbers(plain(x)), expected, atol=TOLERANCE)


def test_the_constructor_forgets_its_alpha():
    """If this fails Keras was mended: say so in keras_lora.py."""
    dense = dense_of(6, 5)
    told = keras.layers.Dense(5, lora_rank=2, lora_alpha=8)
    told.build((None, 6))
    assert told.lora_alpha == 2 and dense.lora_alpha != 8


# ---- which backend


def test_a_backend_that_was_chosen_is_kept(tmp_path):
    config = tmp_path / "keras.json"
    none, every = (lambda name: False), (lambda name: True)
    assert keras_lora.backend_for({"KERAS_BACKEND": "jax"}, config, none) is None
    assert keras_lora.backend_for({}, config, every) == "torch"  # there is no file
    config.write_text(json.dumps({"backend": "tensorflow"}))
    assert keras_lora.backend_for({}, config, every) is None
    assert keras_lora.backend_for({}, config, none) == "torch"  # what Keras wrote by itself, without TensorFlow
    config.write_text("{")
    assert keras_lora.backend_for({}, config, every) == "torch"
    config.write_text("[]")
    assert keras_lora.backend_for({}, config, every) == "torch"


def test_without_keras_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    spec = importlib.util.spec_from_file_location("lora_lab.zoo.keras_again", keras_lora.__file__)
    with pytest.raises(ImportError, match=r"pip install 'lora-lab\[keras\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_tensor_of_tensorflow_has_no_squeeze():
    """What claim no. 34 says of the printed line; the function that there is leaves one axis of (4, 1)."""
    tf = pytest.importorskip("tensorflow")
    product = tf.matmul(tf.ones((4, 3)), tf.ones((3, 1)))
    with pytest.raises(AttributeError, match="squeeze"):
        product.squeeze(-1)
    assert tf.squeeze(product, -1).shape == (4,)
