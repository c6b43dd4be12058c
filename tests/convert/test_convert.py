"""Conversion between parameter layouts in NumPy: round trips, errors, files, the command line.

test_convert_peers.py compares the layouts with the libraries that define them.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from common import oracle
from common.convert import FORMATS, convert, from_format, to_format
from common.convert.__main__ import main
from common.convert.files import read_tensors, write_tensors
from common.errors import InputError

Tensors = dict[str, np.ndarray]
T, B, D, H, C, V = 4, 3, 3, 5, 2, 7
FOREIGN = [name for name in FORMATS if name != "canonical"]
KINDS = [(name, kind) for name in FOREIGN for kind in FORMATS[name].reset_kinds]
CASES = [
    (name, kind, layers, directions)
    for name, kind in KINDS
    for layers, directions in [(1, 1), (1, 2), (2, 1), (2, 2)]
    if name != "homework" or layers == directions == 1
]
SEPARATE_BIASES = ("torch", "homework")
EXTENSIONS = (".safetensors", ".npz", ".pt")

# The keys and shapes of docs/layouts.md, for one layer in one direction; H=5, D=3, C=2, V=7.
KERNEL_HEAD = {"head/kernel": (5, 2), "head/bias": (2,)}
HEAD = {"head.weight": (2, 5), "head.bias": (2,), "vectors.weight": (7, 3)}
FC = {"fc.weight": (2, 5), "fc.bias": (2,), "vectors.weight": (7, 3)}
TORCH = {
    "gru.weight_ih_l0": (15, 3),
    "gru.weight_hh_l0": (15, 5),
    "gru.bias_ih_l0": (15,),
    "gru.bias_hh_l0": (15,),
}
ONNX = {"gru.0.W": (1, 15, 3), "gru.0.R": (1, 15, 5), "gru.0.B": (1, 30)}
KERAS = {
    "gru/0/forward/kernel": (3, 15),
    "gru/0/forward/recurrent_kernel": (5, 15),
    **KERNEL_HEAD,
    "vectors/embeddings": (7, 3),
}
TABLE = {
    ("torch", True): TORCH | HEAD,
    ("homework-nn", True): TORCH | FC,
    ("homework", False): {
        **{f"gru.W{gate}.weight": (5, 3) for gate in "zrh"},
        **{f"gru.U{gate}.weight": (5, 5) for gate in "zrh"},
        **{f"gru.{part}{gate}.bias": (5,) for part in "WU" for gate in "zrh"},
        **FC,
    },
    ("keras", True): KERAS | {"gru/0/forward/bias": (2, 15)},
    ("keras", False): KERAS | {"gru/0/forward/bias": (15,)},
    ("linen", True): {
        **{f"gru/0/forward/i{gate}/kernel": (3, 5) for gate in "rzn"},
        **{f"gru/0/forward/h{gate}/kernel": (5, 5) for gate in "rzn"},
        **{f"gru/0/forward/{dense}/bias": (5,) for dense in ("ir", "iz", "in", "hn")},
        **KERNEL_HEAD,
        "vectors/embedding": (7, 3),
    },
    ("nnx", True): {
        "gru/0/forward/dense_i/kernel": (3, 15),
        "gru/0/forward/dense_h/kernel": (5, 15),
        "gru/0/forward/dense_i/bias": (15,),
        **KERNEL_HEAD,
        "vectors/embedding": (7, 3),
    },
    ("equinox", True): {
        "gru.0.forward.weight_ih": (15, 3),
        "gru.0.forward.weight_hh": (15, 5),
        "gru.0.forward.bias": (15,),
        "gru.0.forward.bias_n": (5,),
        **HEAD,
    },
    ("haiku", False): {
        "gru/0/forward/w_i": (3, 15),
        "gru/0/forward/w_h": (5, 15),
        "gru/0/forward/b": (15,),
        "head/w": (5, 2),
        "head/b": (2,),
        "vectors/embeddings": (7, 3),
    },
    ("onnx", False): ONNX | HEAD,
    ("onnx", True): ONNX | HEAD,
}


def draw_parameters(
    name: str = "torch",
    layers: int = 1,
    directions: int = 1,
    dtype: str = "float64",
    *,
    gru_only: bool = False,
) -> Tensors:
    """Random canonical parameters that the layout can represent; gru_only omits head and vectors.

    The values are all different, so that a conversion that exchanges two of them is detected.
    """
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for direction in ("forward", "backward")[:directions]:
            scope = f"gru.{layer}.{direction}"
            shapes[f"{scope}.weight_ih"] = (3 * H, H * directions if layer else D)
            shapes[f"{scope}.weight_hh"] = (3 * H, H)
            shapes[f"{scope}.bias_ih"] = shapes[f"{scope}.bias_hh"] = (3 * H,)
    if not gru_only:
        shapes["head.weight"], shapes["head.bias"] = (C, H * directions), (C,)
        shapes["vectors.weight"] = (V, D)
    parameters = {key: rng.uniform(-1, 1, shape).astype(dtype) for key, shape in shapes.items()}
    for key, value in parameters.items():
        if name == "nnx" and key.endswith("bias_hh"):
            value[2 * H :] = 0
    return parameters


def assert_tensors_equal(actual: Tensors, expected: Tensors) -> None:
    """The keys, shapes, dtypes and values are the same."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, err_msg=key, strict=True)


def oracle_outputs(parameters: Tensors, reset_after: bool) -> np.ndarray:
    x = np.random.default_rng(1).uniform(-1, 1, (T, B, D))
    return oracle.forward(parameters, x, np.full(B, T), reset_after=reset_after).outputs


@pytest.mark.parametrize("gru_only", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "reset_after", "layers", "directions"), CASES)
def test_round_trip_preserves_parameters(name, reset_after, layers, directions, dtype, gru_only):
    """Only biases that the layout merges change, and only their sum has a meaning; a second
    round trip changes nothing."""
    parameters = draw_parameters(name, layers, directions, dtype, gru_only=gru_only)
    copies = {key: value.copy() for key, value in parameters.items()}
    tensors = to_format(name, parameters, reset_after=reset_after)
    back = from_format(name, tensors, reset_after=reset_after)

    assert_tensors_equal(parameters, copies)
    assert back.keys() == parameters.keys()
    for key, value in parameters.items():
        assert back[key].dtype == dtype
        assert not any(np.shares_memory(value, other) for other in tensors.values())
        if "bias_" not in key or name in SEPARATE_BIASES:
            np.testing.assert_array_equal(back[key], value, strict=True)
    for key in parameters:
        if key.endswith("bias_ih"):
            other = key.replace("bias_ih", "bias_hh")
            total = parameters[key] + parameters[other]
            np.testing.assert_array_equal(back[key] + back[other], total, strict=True)
    tolerance = 10 * np.finfo(dtype).eps  # merging two biases rounds
    expected = oracle_outputs(parameters, reset_after)
    np.testing.assert_allclose(oracle_outputs(back, reset_after), expected, rtol=0, atol=tolerance)
    assert_tensors_equal(to_format(name, back, reset_after=reset_after), tensors)


@pytest.mark.parametrize(("name", "reset_after"), KINDS)
def test_layout_has_documented_keys_and_shapes(name, reset_after):
    tensors = to_format(name, draw_parameters(name), reset_after=reset_after)
    assert {key: value.shape for key, value in tensors.items()} == TABLE[name, reset_after]
    assert all(value.flags.c_contiguous for value in tensors.values())


def test_convert_translates_between_two_foreign_layouts():
    tensors = to_format("torch", draw_parameters(layers=2, directions=2), reset_after=True)
    onnx = convert(tensors, "torch", "onnx", reset_after=True)
    assert onnx["gru.1.B"].shape == (2, 6 * H)
    assert_tensors_equal(convert(onnx, "onnx", "torch", reset_after=True), tensors)


def test_gru_without_head_has_library_names():
    one = draw_parameters(gru_only=True)
    assert set(to_format("keras", one, reset_after=True)) == {"kernel", "recurrent_kernel", "bias"}
    two = draw_parameters(layers=2, gru_only=True)
    assert "weight_hh_l1" in to_format("torch", two, reset_after=True)
    assert "gru/1/forward/kernel" in to_format("keras", two, reset_after=True)


@pytest.mark.parametrize("name", FOREIGN)
def test_unsupported_reset_kind_is_rejected(name):
    for kind in {False, True} - set(FORMATS[name].reset_kinds):
        tensors = to_format(name, draw_parameters(name), reset_after=not kind)
        with pytest.raises(InputError, match=f"{name} .* reset_after={kind}"):
            to_format(name, draw_parameters(name), reset_after=kind)
        with pytest.raises(InputError, match=f"{name} .* reset_after={kind}"):
            from_format(name, tensors, reset_after=kind)


def test_nnx_rejects_hidden_bias_of_gate_n():
    with pytest.raises(InputError, match=r"gru\.0\.forward\.bias_hh, gate n, .* jax_impl\.GRU"):
        to_format("nnx", draw_parameters(), reset_after=True)


@pytest.mark.parametrize(("layers", "directions"), [(2, 1), (1, 2), (2, 2)])
def test_homework_rejects_more_layers_and_directions(layers, directions):
    with pytest.raises(InputError, match=rf"{layers} layer\(s\) in {directions} direction"):
        to_format(
            "homework", draw_parameters(layers=layers, directions=directions), reset_after=False
        )


@pytest.mark.parametrize("names", [("x", "torch"), ("torch", "x")])
def test_unknown_format_is_rejected(names):
    with pytest.raises(InputError, match=r"unknown format 'x': expected one of canonical, torch"):
        convert(draw_parameters(), *names, reset_after=True)


@pytest.mark.parametrize(("name", "reset_after"), [*KINDS, ("canonical", False)])
def test_error_names_missing_and_unexpected_keys(name, reset_after):
    tensors = to_format(name, draw_parameters(name), reset_after=reset_after)
    for key in tensors:
        is_optional = re.fullmatch(r"vectors.*|gru.*(dense_i/bias|forward/bias|/b|\.B)", key)
        if is_optional:
            continue
        fewer = {other: value for other, value in tensors.items() if other != key}
        with pytest.raises(InputError, match=f"no key {key}, "):
            from_format(name, fewer, reset_after=reset_after)
    with pytest.raises(InputError, match=r"unexpected key encoder\.weight"):
        from_format(name, tensors | {"encoder.weight": np.ones(3)}, reset_after=reset_after)
    with pytest.raises(InputError, match=r"no key .*0 keys: none"):
        from_format(name, {}, reset_after=reset_after)


@pytest.mark.parametrize("prefix", ["net.", "a/b.", "{layer}/"])
@pytest.mark.parametrize(("name", "reset_after"), [*KINDS, ("canonical", False)])
def test_keys_may_have_any_prefix(name, reset_after, prefix):
    layers = 1 if name == "homework" else 2
    parameters = draw_parameters(name, layers, layers)
    tensors = to_format(name, parameters, reset_after=reset_after)
    expected = from_format(name, tensors, reset_after=reset_after)
    prefixed = {prefix + key: value for key, value in tensors.items()}
    assert_tensors_equal(from_format(name, prefixed, reset_after=reset_after), expected)
    left_out: list[str] = []
    others = {"norm.steps": np.int64(3), "fc2/b": np.ones(2), f"{prefix}out.weight": np.ones(1)}
    from_format(name, {**others, **prefixed}, reset_after=reset_after, left_out=left_out)
    assert left_out == list(others)


@pytest.mark.parametrize(("name", "reset_after"), KINDS)
def test_missing_biases_become_zeros(name, reset_after):
    parameters = draw_parameters(name, gru_only=True)
    for key in parameters:
        if "bias" in key:
            parameters[key][:] = 0
    tensors = to_format(name, parameters, reset_after=reset_after)
    without = {key: value for key, value in tensors.items() if value.any()}
    assert len(without) < len(tensors)
    assert_tensors_equal(from_format(name, without, reset_after=reset_after), parameters)


def test_prefix_selects_one_of_several_grus():
    one, two = (
        to_format("torch", draw_parameters(layers=n, gru_only=True), reset_after=True)
        for n in (1, 2)
    )
    lstm = {"lstm.weight_hh_l0": np.ones((4 * H, H)), "lstm.weight_ih_l0": np.ones((4 * H, D))}
    both = {f"encoder.gru.{key}": value for key, value in one.items()} | lstm
    assert len(from_format("torch", both, reset_after=True, left_out=[])) == 4
    both |= {f"decoder.{key}": value for key, value in two.items()}
    message = "there are 2 GRUs in the torch layout, at 'encoder.gru', 'decoder': choose by --pref"
    for prefix in (None, "gru"):
        with pytest.raises(InputError, match=message):
            from_format("torch", both, reset_after=True, prefix=prefix, left_out=[])
    for prefix, size in (("encoder.gru", 4), ("decoder.", 8)):
        left_out: list[str] = []
        selected = from_format("torch", both, reset_after=True, prefix=prefix, left_out=left_out)
        assert (len(selected), len(left_out)) == (size, len(both) - size)


def test_layouts_with_equal_names_are_not_confused():
    """The canonical layout and Equinox share names with nn.GRUCell, but not the order of gates."""
    for name in ("canonical", "equinox"):
        tensors = to_format(name, draw_parameters(), reset_after=True)
        with pytest.raises(InputError, match="no key gru"):
            from_format("torch", tensors, reset_after=True, left_out=[])
    gru = to_format("equinox", draw_parameters(gru_only=True), reset_after=True)
    with pytest.raises(InputError, match="unexpected key bias"):
        from_format("torch", gru, reset_after=True, left_out=[])
    more = to_format("nnx", draw_parameters("nnx"), reset_after=True)
    more["gru/0/forward/dense_h/bias"] = np.ones(3 * H)
    with pytest.raises(InputError, match="unexpected key gru/0/forward/dense_h/bias"):
        from_format("nnx", more, reset_after=True, left_out=[])


def test_shape_error_states_both_shapes_and_the_layout():
    tensors = to_format("torch", draw_parameters(), reset_after=True)
    tensors["gru.weight_ih_l0"] = np.ones((12, 3))
    with pytest.raises(InputError) as caught:
        from_format("torch", tensors, reset_after=True)
    assert str(caught.value) == (
        "gru.weight_ih_l0 has shape [12, 3], expected [15, 3], in the torch layout [3H, D]"
    )


@pytest.mark.parametrize(("name", "reset_after"), [*KINDS, ("canonical", False)])
def test_error_names_tensor_of_wrong_shape(name, reset_after):
    tensors = to_format(name, draw_parameters(name), reset_after=reset_after)
    for key, value in tensors.items():
        for wrong in (value[..., None], np.concatenate([value] * 5, axis=-1)):
            with pytest.raises(InputError) as caught:
                from_format(name, tensors | {key: wrong}, reset_after=reset_after)
            # An axis of five times the length may define H or D: then the error names the first
            # other tensor that disagrees.
            message = str(caught.value)
            assert "has shape [" in message and "expected [" in message
            if wrong.ndim != value.ndim:
                assert message.startswith(f"{key} has shape [{', '.join(map(str, wrong.shape))}]")


@pytest.mark.parametrize(("name", "reset_after"), [*KINDS, ("canonical", False)])
def test_head_may_have_several_pooled_inputs(name, reset_after):
    parameters = draw_parameters(name)
    parameters["head.weight"] = np.tile(parameters["head.weight"], 3)
    tensors = to_format(name, parameters, reset_after=reset_after)
    back = from_format(name, tensors, reset_after=reset_after)
    np.testing.assert_array_equal(back["head.weight"], parameters["head.weight"])


@pytest.mark.parametrize("shape", [(), (0, 0), (15,), (15, 4), (3, 15, 5)])
def test_degenerate_shape_is_rejected(shape):
    tensors = to_format("torch", draw_parameters(), reset_after=True)
    with pytest.raises(InputError, match=r"gru\.weight_hh_l0 has shape \[.*\], expected \[.*H\]"):
        from_format("torch", tensors | {"gru.weight_hh_l0": np.ones(shape)}, reset_after=True)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "object"])
def test_dtype_other_than_float_is_rejected(dtype):
    parameters = draw_parameters()
    parameters["head.bias"] = parameters["head.bias"].astype(dtype)
    with pytest.raises(InputError, match=rf"head\.bias holds {dtype}"):
        to_format("torch", parameters, reset_after=True)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_files_round_trip(tmp_path, extension, dtype):
    path = tmp_path / f"model{extension}"
    tensors = {"a/b": np.arange(6, dtype=dtype).reshape(2, 3).T, "c.d": np.ones(1, dtype)}
    write_tensors(path, tensors)
    back = read_tensors(path)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)
        assert back[key].dtype == value.dtype.newbyteorder("=")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_damaged_file_is_rejected(tmp_path, extension):
    path = tmp_path / f"model{extension}"
    write_tensors(path, draw_parameters())
    data = path.read_bytes()
    damaged = [b"", b"\0", b"nonsense" * 100, *(data[: len(data) * k // 8] for k in range(1, 8))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"model{extension}: not a readable {extension} file"):
            read_tensors(path)


def test_unreadable_and_unwritable_paths_are_rejected(tmp_path):
    with pytest.raises(InputError, match=r"gone\.npz: No such file"):
        read_tensors(tmp_path / "gone.npz")
    with pytest.raises(InputError, match=r"model\.h5: unknown suffix.*\.safetensors"):
        read_tensors(tmp_path / "model.h5")
    with pytest.raises(InputError, match=r"model: unknown suffix"):
        write_tensors(tmp_path / "model", draw_parameters())
    with pytest.raises(InputError, match=r"model\.npz: cannot be written \(No such file"):
        write_tensors(tmp_path / "gone" / "model.npz", draw_parameters())
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match=r"folder\.npz: cannot be written \(Is a directory\)"):
        write_tensors(tmp_path / "folder.npz", draw_parameters())
    with pytest.raises(InputError, match=r"folder\.npz: Is a directory"):
        read_tensors(tmp_path / "folder.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npz"]


def save_pt(path, value, **options) -> None:
    import torch

    torch.save(value, path, **options)


class CallOnLoad:
    """Pickle of this object is a call of the function, which an ordinary unpickler executes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_pt_file_never_executes_code(tmp_path, zipped):
    victim = tmp_path / "victim"
    victim.write_text("here")
    for function, name in [(os.unlink, "posix.unlink"), (shutil.rmtree, "shutil.rmtree")]:
        payload = {"gru.weight_ih_l0": CallOnLoad(function, str(victim))}
        save_pt(tmp_path / "evil.pt", payload, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=rf"evil\.pt: refused: the file loads {name}"):
            read_tensors(tmp_path / "evil.pt")
    assert victim.exists()


def test_pt_file_without_tensors_is_rejected_or_empty(tmp_path):
    import torch

    save_pt(tmp_path / "module.pt", torch.nn.GRU(D, H))
    with pytest.raises(InputError, match=r"refused: the file loads torch\.nn\.modules\.rnn\.GRU"):
        read_tensors(tmp_path / "module.pt")
    save_pt(tmp_path / "list.pt", [torch.ones(1)])
    with pytest.raises(InputError, match="contains a list, expected a dict of tensors"):
        read_tensors(tmp_path / "list.pt")
    recursive: dict = {"epoch": 3}
    shared = recursive | {"model": recursive, "again": recursive}
    recursive["state"] = recursive
    for value in (shared, recursive):
        save_pt(tmp_path / "dict.pt", value)
        assert read_tensors(tmp_path / "dict.pt") == {}


@pytest.mark.parametrize("numpy_1", [True, False])
def test_pt_file_may_contain_numpy_arrays(tmp_path, numpy_1):
    path = tmp_path / "old.pt"
    tensors = to_format("homework", draw_parameters(dtype="float32"), reset_after=False)
    save_pt(path, tensors, _use_new_zipfile_serialization=False)
    if numpy_1:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert_tensors_equal(read_tensors(path), tensors)


def test_pt_file_may_contain_parameters_or_a_state_dict(tmp_path):
    import torch

    gru = torch.nn.GRU(D, H)
    save_pt(tmp_path / "a.pt", gru.state_dict())
    save_pt(tmp_path / "b.pt", dict(gru.named_parameters()))
    for path in tmp_path.iterdir():
        back = from_format("torch", read_tensors(path), reset_after=True)
        np.testing.assert_array_equal(
            to_format("torch", back, reset_after=True)["weight_hh_l0"],
            gru.weight_hh_l0.detach().numpy(),
        )


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_bfloat16_becomes_float32(tmp_path, extension):
    import ml_dtypes
    import torch
    from safetensors.torch import save_file

    tensors = to_format("torch", draw_parameters(dtype="float32"), reset_after=True)
    rounded = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    path = tmp_path / f"half{extension}"
    if extension == ".npz":
        np.savez(path, **rounded)
    else:
        save = save_file if extension == ".safetensors" else torch.save
        save({key: torch.tensor(value).bfloat16() for key, value in tensors.items()}, path)
    converted = from_format("torch", rounded, reset_after=True)
    assert {value.dtype.name for value in converted.values()} == {"float32"}
    expected = {key: value.astype(np.float32) for key, value in rounded.items()}
    assert_tensors_equal(read_tensors(path), expected)


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", None])
@pytest.mark.parametrize("layer", ["GRU", "GRU without biases", "GRU both ways", "GRUCell"])
def test_training_checkpoint_of_torch_is_converted(tmp_path, monkeypatch, command, layer, wrapper):
    """The GRU is found under the key of a wrapper, among other layers and training state."""
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)
    gru = {
        "GRU": nn.GRU(D, H),
        "GRU without biases": nn.GRU(D, H, bias=False),
        "GRU both ways": nn.GRU(D, H, bidirectional=True, num_layers=2),
        "GRUCell": nn.GRUCell(D, H),
    }[layer]
    parts = {"embedding": nn.Embedding(V, D), "rnn": gru, "norm": nn.BatchNorm1d(H)}
    net = nn.ModuleDict({"module": nn.ModuleDict({**parts, "classifier": nn.Linear(H, C)})})
    state = net.state_dict()
    save_pt("net.pth", {wrapper: state, "epoch": 3, "args": {"lr": 0.1}} if wrapper else state)
    _, output, _ = command(main, "net.pth", "gru.npz", "--from", "torch", "--to", "canonical")
    prefix = f"{wrapper}.module" if wrapper else "module"
    layers = ", ".join(f"{prefix}.{name}" for name in ("embedding", "norm", "classifier"))
    assert f"left out, not part of the GRU: {layers}\n" in output

    x = np.random.default_rng(1).uniform(-1, 1, (T, B, D))
    parameters = read_tensors(tmp_path / "gru.npz")
    actual = oracle.forward(parameters, x, np.full(B, T), reset_after=True).outputs
    with torch.no_grad():
        steps, h = torch.tensor(x, dtype=torch.float32), torch.zeros(B, H)
        if layer == "GRUCell":
            expected = torch.stack([h := gru(step, h) for step in steps])
        else:
            expected, _ = gru(steps)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_command_line_round_trip(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    parameters = draw_parameters(layers=2, directions=2)
    write_tensors(tmp_path / "a.safetensors", parameters)
    options = ("--from", "canonical", "--to", "torch", "--reset-after", "True")
    output = "b.pt: 19 tensors in the torch layout, reset_after=True\n"
    assert command(main, "a.safetensors", "b.pt", *options) == (0, output, "")
    # The layout torch implies reset_after=True.
    assert command(main, "b.pt", "c.npz", "--from", "torch", "--to", "canonical")[0] == 0
    assert_tensors_equal(read_tensors(tmp_path / "c.npz"), parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.npz b.pt --from canonical --to torch", r"a\.npz: torch applies .*reset_after=False"),
        ("a.npz b.pt --from torch --to canonical", r"a\.npz: no key gru\.weight_hh_l0"),
        ("a.npz b.pt --from canonical --to tensorflow", "tensorflow"),
        ("x.npz b.pt --from canonical --to haiku", r"x\.npz: No such file"),
        ("a.npz b.txt --from canonical --to haiku", r"b\.txt: unknown suffix"),
        ("a.npz b.pt --from canonical", "--to"),
    ],
)
def test_command_line_errors(tmp_path, monkeypatch, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "a.npz", draw_parameters())
    (tmp_path / "b.pt").write_bytes(b"unchanged")
    status, output, error = command(main, *arguments.split())
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert re.search(message, error)
    assert (tmp_path / "b.pt").read_bytes() == b"unchanged"
    assert len(list(tmp_path.iterdir())) == 2


def test_conversion_imports_no_framework():
    code = (
        "import sys, common.convert.__main__;"
        "assert not {'torch', 'jax', 'flax', 'keras'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
