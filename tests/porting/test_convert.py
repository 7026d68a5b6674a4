"""The engine of the weight tables, on a small table with every kind of rule."""

import jax
import ml_dtypes
import numpy as np
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.porting import convert
from blip3o_jax.porting.convert import Rule

RULES = [
  Rule("layers.{i}.qkv.weight", tuple(f"layers/{n}/kernel" for n in "qkv"), "linear"),
  Rule("down.{i}.resnets.{j}.conv.weight", "down_{i}/conv/kernel", "conv"),
  Rule("old.{i}.bias", "old/bias", aliases=(("old.{i}.q_bias", None, "old.{i}.v_bias"),)),
  Rule("patch.weight", "patch/kernel", "patch_conv"),
  Rule("cube.weight", "cube/kernel", "patch_conv3d"),
  Rule("flat.weight", "flat/kernel", "patch_conv_channels_first:2"),
  Rule("point.weight", "point/kernel", "conv1x1_linear", aliases=("pixel.weight",)),
  Rule("cls", "cls", "squeeze2"),
  Rule("head.weight", "head", "linear", optional=True),
  Rule("{*}inv_freq", None),
]

SHAPES = {
  **{f"layers.{i}.qkv.weight": (12, 5) for i in range(3)},
  **{f"down.{i}.resnets.{j}.conv.weight": (6, 5, 3, 3) for i in range(2) for j in range(2)},
  **{f"old.{i}.bias": (6,) for i in range(2)},
  "patch.weight": (8, 3, 4, 4),
  "cube.weight": (8, 3, 2, 4, 4),
  "flat.weight": (8, 2, 4, 4),
  "point.weight": (4, 7, 1, 1),
  "cls": (1, 1, 7),
}

LEAVES = {
  **{f"layers/{n}/kernel": (3, 5, 4) for n in "qkv"},
  "down_0/conv/kernel": (2, 3, 3, 5, 6),
  "down_1/conv/kernel": (2, 3, 3, 5, 6),
  "old/bias": (2, 6),
  "patch/kernel": (48, 8),
  "cube/kernel": (96, 8),
  "flat/kernel": (32, 8),
  "point/kernel": (7, 4),
  "cls": (7,),
}


def weights():
  rng = np.random.default_rng(0)
  return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


ABSTRACT = convert.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in LEAVES.items()})


def test_there_and_back():
  reference = weights()
  back = dict(convert.to_reference(RULES, convert.to_ours(RULES, reference, ABSTRACT)))
  assert back.keys() == reference.keys()
  for key, array in reference.items():
    np.testing.assert_array_equal(back[key], array, err_msg=key)
  specs = convert.reference_specs(RULES, ABSTRACT)
  assert {key: spec.shape for key, spec in specs.items()} == SHAPES


def test_layouts():
  reference = weights()
  params = convert.to_ours(RULES, reference, ABSTRACT)
  # The middle third of layer 1's fused matrix, transposed.
  np.testing.assert_array_equal(params["layers"]["k"]["kernel"][1], reference["layers.1.qkv.weight"][4:8].T)
  # Placeholders in the target are names, the others are stacked.
  conv = reference["down.1.resnets.0.conv.weight"]
  assert params["down_1"]["conv"]["kernel"][0, 2, 1, 4, 5] == conv[5, 4, 2, 1]
  x = np.random.default_rng(1).standard_normal((3, 4, 4)).astype(np.float32)  # one patch, (channel, row, column)
  expected = np.einsum("ockl,ckl->o", reference["patch.weight"], x)
  np.testing.assert_allclose(x.transpose(1, 2, 0).reshape(-1) @ params["patch"]["kernel"], expected, rtol=1e-5)
  x = x[:2]
  expected = np.einsum("ockl,ckl->o", reference["flat.weight"], x)
  np.testing.assert_allclose(x.reshape(-1) @ params["flat"]["kernel"], expected, rtol=1e-5)


def test_other_spellings_and_optional_keys():
  reference = weights()
  reference["pixel.weight"] = reference.pop("point.weight")
  for i in range(2):
    bias = reference.pop(f"old.{i}.bias")
    reference |= {f"old.{i}.q_bias": bias[:2], f"old.{i}.v_bias": bias[4:]}
  reference |= {"head.weight": np.ones((3, 2), np.float32), "layers.0.inv_freq": np.ones(2, np.float32)}
  params = convert.to_ours(RULES, reference, ABSTRACT)
  np.testing.assert_array_equal(params["point"]["kernel"], reference["pixel.weight"][:, :, 0, 0].T)
  np.testing.assert_array_equal(params["old"]["bias"][:, 2:4], 0)
  np.testing.assert_array_equal(params["old"]["bias"][1, 4:], reference["old.1.v_bias"])


def test_everything_wrong_is_told_at_once():
  reference = weights()
  reference["stranger"] = np.zeros(2, np.float32)
  reference["layers.3.qkv.weight"] = reference["layers.0.qkv.weight"]
  reference["pixel.weight"] = reference["point.weight"]
  reference["patch.weight"] = np.zeros((8, 3, 4, 5), np.float32)
  reference["old.0.q_bias"] = np.zeros(2, np.float32)
  del reference["cls"], reference["old.1.bias"]
  with pytest.raises(UserError) as error:
    convert.to_ours(RULES, reference, ABSTRACT)
  lines = str(error.value).splitlines()
  assert lines[0].endswith("7 problems:")
  for text in (
    "stranger: expected no such key",
    "layers.3.qkv.weight: expected no such key (this model has no parameter for it)",
    "pixel.weight: expected once, but point.weight is there as well",
    "patch.weight: expected [8, 3, 4, 4], found [8, 3, 4, 5]",
    "old.0.q_bias: expected beside it old.0.v_bias, found nothing",
    "old.1.bias: expected [6], found nothing",
    "cls: expected [1, 1, 7], found nothing",
  ):
    assert f"  {text}" in lines, text


def test_a_key_for_which_the_model_has_no_place():
  abstract = {name: tree for name, tree in ABSTRACT.items() if name != "cls"}
  with pytest.raises(UserError, match=r"cls: expected no such key \(this model has no parameter for it\)"):
    convert.to_ours(RULES, weights(), abstract)


def test_parameters_without_a_rule():
  with pytest.raises(UserError, match="parameter extra: expected one rule"):
    convert.to_reference(RULES, {"extra": np.zeros(2)})
  with pytest.raises(UserError, match="parameter extra: expected one rule"):
    convert.to_ours(RULES, weights(), {**ABSTRACT, "extra": jax.ShapeDtypeStruct((2,), np.float32)})
  twice = [*RULES, Rule("klass", "cls")]
  with pytest.raises(UserError, match="parameter cls: expected one rule that writes it, found 2"):
    convert.to_reference(twice, {"cls": np.zeros(7)})


def test_leaf_by_leaf():
  seen = []

  def place(path, array):
    seen.append(path)
    return array.shape

  placed = convert.to_ours(RULES, weights(), ABSTRACT, place=place)
  assert sorted(seen) == sorted(convert.flatten(ABSTRACT)) and convert.flatten(placed) == LEAVES


def test_what_float16_cannot_hold_is_told():
  params = convert.to_ours(RULES, weights(), ABSTRACT)
  params["cls"] = np.full(7, 65504, np.float32)
  assert dict(convert.to_reference(RULES, params, np.float16))["cls"].max() == 65504
  for dtype in (np.float32, ml_dtypes.bfloat16):
    params["cls"] = np.full(7, 1e5, dtype)
    with pytest.raises(UserError, match="cls: has numbers too large for float16; take bfloat16"):
      dict(convert.to_reference(RULES, params, np.float16))
  params["cls"] = np.full(7, np.inf, np.float32)  # was so before
  assert np.isinf(dict(convert.to_reference(RULES, params, np.float16))["cls"]).all()


def test_content_hash_sees_values_names_and_dtype_but_not_layout():
  params = convert.to_ours(RULES, weights(), ABSTRACT)
  digest = lambda *args: convert.content_hash(convert.to_reference(RULES, *args))
  expected = digest(params)
  reordered = dict(reversed(params.items()))
  assert digest(reordered) == expected
  assert digest(jax.tree.map(jax.numpy.asarray, params)) == expected
  assert digest(params, np.float16) != expected
  params["cls"] = params["cls"] + np.float32(1e-6)
  assert digest(params) != expected
