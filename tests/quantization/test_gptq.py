"""GPTQ loses less of a layer's output than rounding to nearest, and is the textbook's algorithm."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import NonFinite, NotPositiveDefinite
from pipeline.formats import awq
from pipeline.quantization import gptq
from pipeline.quantization.gptq import round_gptq, trace_error
from pipeline.quantization.grids import find_grid, nearest, onto
from pipeline.targets import GPTQTarget
from tests.formats.groups import packed, quantized

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib-lm-awq"
OPTIONS = [
    {"group_size": 32},
    {"group_size": 16, "bits": 3},
    {"group_size": 128, "bits": 2, "symmetric": False},
    {"group_size": -1, "bits": 8},
    {"group_size": 256, "symmetric": False},
    {"group_size": 32, "desc_act": True},
    {"group_size": 64, "desc_act": True, "static_groups": True, "symmetric": False},
    {"group_size": -1, "desc_act": True, "bits": 3},
    {"group_size": 32, "bits": 3, "mse": True},
]


def target(**options):
    return GPTQTarget(format="gptq", **options)


def layer(outputs=48, inputs=256, *, seed=0):
    """A weight, and the Gram matrix of inputs that are correlated and of unlike size, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    rows = torch.randn(4 * inputs, inputs, generator=generator) @ mixed
    rows *= torch.exp(torch.randn(inputs, generator=generator))
    return weight, rows.T @ rows


def order_of(activity, size):
    """Groups by their most active input, inputs within a group by their activity; those first that have most."""
    groups = [range(start, start + size) for start in range(0, len(activity), size)]
    groups.sort(key=lambda group: max(activity[i] for i in group), reverse=True)
    return torch.tensor([i for group in groups for i in sorted(group, key=lambda i: activity[i], reverse=True)])


def textbook(weight, gram, options):
    """GPTQ as the paper has it: float64, one column after another, the inverse's Cholesky factor; codes [O, I]."""
    inputs = weight.shape[1]
    size = inputs if options.group_size == -1 else options.group_size
    order = order_of(gram.diagonal().tolist(), inputs if options.desc_act else size)
    found = {"bits": options.bits, "symmetric": options.symmetric, "mse": options.mse}
    scales, zeros = (part.double() for part in find_grid(weight, group_size=size, **found))
    left, codes = weight[:, order].double(), torch.zeros_like(weight, dtype=torch.uint8)
    damped = gram[order][:, order].double()
    damped += options.damping * damped.diagonal().mean() * torch.eye(inputs)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for i, column in enumerate(order.tolist()):
        group = (i if options.desc_act and not options.static_groups else column) // size
        if i % size == 0 and not (options.static_groups or size == inputs):
            scale, zero = find_grid(left[:, i : i + size].float(), group_size=-1, **found)
            scales[:, group], zeros[:, group] = scale[:, 0].double(), zero[:, 0].double()
        step, zero = scales[:, group], zeros[:, group]
        code = (torch.round(left[:, i] / step) + zero).clamp(0, 2**options.bits - 1)
        lost = (left[:, i] - (code - zero) * step) / inverse[i, i]
        left[:, i:] -= lost[:, None] * inverse[i, i:]
        codes[:, column] = code.to(torch.uint8)
    return codes, scales, zeros


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_textbooks_algorithm(options):
    """All but a few codes, which lie so near the middle between two that float32 cannot tell."""
    weight, gram = layer()
    codes, scales, zeros = textbook(weight, gram, target(**options))
    rounded = round_gptq(weight, gram, target=target(**options))
    assert float((rounded.codes == codes).float().mean()) > 0.99
    assert torch.allclose(rounded.scales.double(), scales, rtol=2e-3)
    assert float((rounded.zeros == zeros).float().mean()) > 0.99


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_loses_less_of_the_output_than_rounding_to_nearest(options):
    weight, gram = layer()
    ways = target(**options)
    plain = nearest(weight, bits=ways.bits, group_size=ways.group_size, symmetric=ways.symmetric, mse=ways.mse)
    rounded = round_gptq(weight, gram, target=ways)
    assert trace_error(rounded.dense() - weight, gram) < trace_error(plain.dense() - weight, gram)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.down_proj"])
def test_it_does_on_the_weights_of_a_real_model(module):
    tensors = load_file(EXAMPLE / "model.safetensors")
    name = f"model.layers.3.{module}"
    parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
    weight = awq.dequantize(packed(parts), quantized("awq", bits=4, group_size=64))
    _, gram = layer(inputs=weight.shape[1])
    for ways in (target(group_size=128), target(group_size=64, bits=3, desc_act=True)):
        plain = nearest(weight, bits=ways.bits, group_size=ways.group_size, symmetric=True)
        rounded = round_gptq(weight, gram, target=ways)
        assert trace_error(rounded.dense() - weight, gram) < 0.7 * trace_error(plain.dense() - weight, gram)


def test_two_values_by_hand():
    """Equal inputs: what the first weight loses the second takes over, as far as the damping lets it."""
    weight, gram = torch.tensor([[0.4, 0.4, 7.5, -7.5]]), torch.eye(4)
    gram[:2, :2] = 1.0
    rounded = round_gptq(weight, gram, target=target(group_size=-1))
    assert rounded.scales.tolist() == [[1.0]]
    assert rounded.dense().tolist() == [[0.0, 1.0, 7.0, -8.0]]


def test_the_most_active_inputs_come_first_and_groups_stay_together():
    activity = torch.tensor([1.0, 4.0, 9.0, 2.0, 5.0, 5.0])
    assert gptq._order(activity, 2).tolist() == [2, 3, 4, 5, 1, 0]
    assert gptq._order(activity, 6).tolist() == [2, 4, 5, 1, 3, 0]


def test_groups_follow_the_order_of_the_columns_unless_they_are_static():
    weight, gram = layer(inputs=128)
    order = torch.argsort(gram.diagonal(), descending=True)
    rounded = round_gptq(weight, gram, target=target(group_size=32, desc_act=True))
    assert rounded.groups.dtype == torch.int32
    assert rounded.groups[order].tolist() == [i // 32 for i in range(128)]
    static = round_gptq(weight, gram, target=target(group_size=32, desc_act=True, static_groups=True))
    assert static.groups.tolist() == [i // 32 for i in range(128)]
    scales, zeros = find_grid(weight, bits=4, group_size=32, symmetric=True)
    assert torch.equal(static.scales, scales)
    assert torch.equal(static.zeros, zeros)


@pytest.mark.parametrize("options", [{"group_size": 32}, {"group_size": 32, "desc_act": True}], ids=str)
def test_weights_on_a_kept_grid_keep_their_codes(options):
    weight, gram = layer()
    once = round_gptq(weight, gram, target=target(**options))
    _, other = layer(seed=1)
    again = round_gptq(once.dense().bfloat16().float(), other, target=target(**options), fixed=once)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.groups, once.groups)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_changed_weight_is_compensated_on_the_kept_grid(ordered):
    weight, gram = layer()
    old = round_gptq(weight, gram, target=target(group_size=32, desc_act=True, symmetric=False))
    changed = weight + 0.01 * layer(seed=2)[0]
    rounded = round_gptq(changed, gram, target=target(group_size=32, desc_act=ordered, symmetric=False), fixed=old)
    assert torch.equal(rounded.scales, old.scales)
    assert torch.equal(rounded.zeros, old.zeros)
    assert torch.equal(rounded.groups, old.groups)
    plain = onto(changed, old)
    assert trace_error(rounded.dense() - changed, gram) < 0.7 * trace_error(plain.dense() - changed, gram)


def test_linears_of_one_input_may_be_stacked():
    weight, gram = layer()
    whole = round_gptq(weight, gram, target=target(group_size=32))
    halves = [round_gptq(part, gram, target=target(group_size=32)) for part in weight.split(24)]
    assert float((whole.codes == torch.cat([half.codes for half in halves])).float().mean()) > 0.99


def test_the_same_input_gives_the_same_codes_and_stays_as_it_was():
    weight, gram = layer()
    before = weight.clone(), gram.clone()
    first, second = (round_gptq(weight, gram, target=target(group_size=32, desc_act=True)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("ordered", [False, True])
def test_an_input_that_was_never_active_is_rounded_to_nearest(ordered):
    weight, gram = layer()
    dead = torch.arange(0, 256, 7)
    gram[dead], gram[:, dead] = 0.0, 0.0
    ways = target(group_size=-1, desc_act=ordered)
    plain = nearest(weight, bits=4, group_size=-1, symmetric=True)
    rounded = round_gptq(weight, gram, target=ways)
    assert torch.equal(rounded.codes[:, dead], plain.codes[:, dead])
    silent = round_gptq(weight, torch.zeros_like(gram), target=ways)
    assert torch.equal(silent.codes, plain.codes)


def test_fewer_rows_than_inputs_are_enough():
    weight, _ = layer()
    rows = torch.randn(20, 256, generator=torch.Generator().manual_seed(3))
    gram = rows.T @ rows
    rounded = round_gptq(weight, gram, target=target(group_size=32))
    plain = nearest(weight, bits=4, group_size=32, symmetric=True)
    assert trace_error(rounded.dense() - weight, gram) < 0.5 * trace_error(plain.dense() - weight, gram)


def test_damping_is_raised_until_the_gram_matrix_is_positive_definite():
    """An eigenvalue of minus a twentieth of the mean: 0.01 is too little, 0.1 is enough."""
    weight, gram = layer()
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(256)
    raised = round_gptq(weight, gram, target=target(group_size=32))
    asked = round_gptq(weight, gram, target=target(group_size=32, damping=0.1))
    assert torch.equal(raised.codes, asked.codes)


def test_what_no_damping_helps_is_refused():
    weight, gram = layer()
    with pytest.raises(NotPositiveDefinite, match="not positive definite, even with its mean diagonal added"):
        round_gptq(weight, gram - 3 * gram.diagonal().mean() * torch.eye(256), target=target(group_size=32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_in_either_is_refused(bad):
    weight, gram = layer()
    wrong = gram.clone()
    wrong[3, 200] = bad
    with pytest.raises(NonFinite, match="calibration rows"):
        round_gptq(weight, wrong, target=target(group_size=32))
    old = round_gptq(weight, gram, target=target(group_size=32))
    weight[5, 70] = bad
    for fixed in (None, old):
        with pytest.raises(NonFinite, match="the weights hold NaN"):
            round_gptq(weight, gram, target=target(group_size=32), fixed=fixed)


def test_a_weight_beyond_float16_is_refused_in_the_middle():
    weight, gram = layer()
    weight[5, 200] = 1e7
    with pytest.raises(NonFinite, match="no float16 scale"):
        round_gptq(weight, gram, target=target(group_size=32))


def test_one_row_is_rounded_and_left_as_it_was():
    """Its transpose is contiguous as it lies."""
    weight, gram = layer(outputs=1)
    before = weight.clone()
    rounded = round_gptq(weight, gram, target=target(group_size=32))
    assert torch.equal(weight, before)
    assert rounded.codes.shape == (1, 256)


def test_a_bare_gram_matrix_leaves_rounding_to_nearest():
    weight, _ = layer()
    rounded = round_gptq(weight, torch.eye(256), target=target(group_size=32))
    assert torch.equal(rounded.codes, nearest(weight, bits=4, group_size=32, symmetric=True).codes)


def test_the_trace_error_is_the_squared_error_of_the_outputs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, delta = torch.randn(100, 16, generator=generator), torch.randn(9, 16, generator=generator)
    expected = float((rows.double() @ delta.double().T).square().sum())
    assert trace_error(delta, rows.T @ rows) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 4)
    assert trace_error(delta, rows.T @ rows) == pytest.approx(expected, rel=1e-5)
