"""The calibration pass gives what the whole model would, one layer in memory at a time."""

from dataclasses import replace

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite, StageFailed, UnsupportedFormat
from pipeline.quantization import calibration
from pipeline.quantization.calibration import Pass, State
from pipeline.quantization.grams import Grams
from pipeline.quantization.strands import Strands
from pipeline.quantization.streamed import Streamed, linears_of
from pipeline.shards import ShardReader
from tests.architectures import ARCHITECTURES, VOCABULARY

LENGTH = 12
CPU = torch.device("cpu")
# Every way in which layers are called: masks and positions by layer, biases, tied heads, tuples, several lists.
WALKED = (
    "llama, tied", "biases on q, k and v", "norms on q and k", "phi-3", "gpt-neox", "falcon", "bloom", "gpt-2", "opt",
    "gemma-2", "gemma-3", "bert", "modernbert", "a sequence classifier", "t5",
)  # fmt: skip


def samples(count=5, length=LENGTH, seed=0):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def saved(tmp_path, name, change=None):
    model = ARCHITECTURES[name].build()
    if change:
        change(model)
    model.save_pretrained(tmp_path / "model")
    return model, Checkpoint.open(tmp_path / "model")


def streamed(checkpoint):
    return Streamed(checkpoint, ShardReader(checkpoint).__getitem__, device=CPU)


def inputs_of(model, rows, **given):
    """Linear module → its inputs [tokens, I] in the whole model, in float64."""
    found, hooks = {}, []

    def hear(name, given):
        found[name] = given.flatten(0, -2).double()

    for name, module in linears_of(model).items():
        hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: hear(name, given[0])))
    with torch.no_grad():
        model(input_ids=torch.tensor(rows), **given)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", WALKED)
def test_a_model_in_layers_gives_what_the_whole_one_gives(tmp_path, name):
    model, checkpoint = saved(tmp_path, name)
    model = model.float()
    given = {"decoder_input_ids": torch.tensor(samples())} if name == "t5" else {}
    walker = streamed(checkpoint)
    batches = calibration.batches_of(samples())
    if given:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    with torch.no_grad(), Strands(walker.model, walker.layers, batches) as strands:
        seen = []
        while (layer := strands.waiting) is not None:
            seen.append(layer)
            with walker.loaded(layer):
                strands.advance()
            assert all(parameter.is_meta for parameter in walker.layers[layer].parameters())
        found = torch.cat([output.logits for output in strands.outputs])
        right = model(input_ids=torch.tensor(samples()), **given).logits
    assert seen == list(walker.layers)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", ["llama, tied", "gpt-neox", "gemma-3", "bert"])
def test_grams_are_those_of_the_inputs_and_shared_where_the_input_is(tmp_path, name):
    model, checkpoint = saved(tmp_path, name)
    inputs = inputs_of(model.float(), samples())
    for passed in Pass(streamed(checkpoint), samples(), spill=tmp_path):
        assert {module for names in passed.grams for module in names} == set(linears_of(passed.module))
        for names, gram in passed.grams.items():
            for module in names:
                x = inputs[f"{passed.name}.{module}"]
                right = x.T @ x
                assert torch.allclose(gram.double(), right, atol=1e-5 * float(right.abs().max()))
    if name == "llama, tied":
        assert [len(names) for names in passed.grams] == [3, 1, 2, 1]


def test_wide_inputs_are_multiplied_in_parts_of_the_upper_triangle():
    module = torch.nn.Linear(1000, 2, bias=False)
    grams, x = Grams({"wide": module}), torch.randn(64, 1000)
    for part in x.split(40):
        with grams.listening():
            module(part)
    ((names, gram),) = grams.finish("layer").items()
    assert names == ("wide",)
    assert torch.equal(gram, gram.T)
    assert torch.allclose(gram, x.T @ x, atol=1e-3)


def grams_of(going):
    return [(passed.name, names, gram.clone()) for passed in going for names, gram in passed.grams.items()]


@pytest.mark.parametrize("name", ["llama, tied", "bloom", "gemma-3"])
def test_a_pass_goes_on_from_its_state_to_the_same_bits(tmp_path, name):
    _, checkpoint = saved(tmp_path, name)
    walker, whole = streamed(checkpoint), []
    for passed in Pass(walker, samples(), spill=tmp_path):
        whole += [(passed.name, names, gram.clone()) for names, gram in passed.grams.items()]
        if passed.index == 0:
            passed.state().save(tmp_path / "state")
            begun = len(whole)
    going = Pass(walker, samples(), spill=tmp_path, state=State.load(tmp_path / "state"))
    assert going.fits()
    rest = grams_of(going)
    assert [entry[:2] for entry in rest] == [entry[:2] for entry in whole[begun:]]
    assert all(torch.equal(found[2], right[2]) for found, right in zip(rest, whole[begun:], strict=True))


def test_a_state_that_a_layers_other_inputs_hang_on_is_not_gone_on_from(tmp_path):
    """As T5's first layer makes the position bias of the others, which its hidden states do not hold."""
    _, checkpoint = saved(tmp_path, "llama, tied")
    walker = streamed(checkpoint)
    going = iter(Pass(walker, samples(), spill=tmp_path))
    state = next(going).state()
    going.close()
    assert Pass(walker, samples(), spill=tmp_path, state=state).fits()
    assert not Pass(walker, samples(), spill=tmp_path, state=replace(state, beside="of other positions")).fits()


def test_activations_beyond_the_memory_for_them_lie_in_files_with_the_same_bits(tmp_path, monkeypatch):
    _, checkpoint = saved(tmp_path, "llama, tied")
    walker = streamed(checkpoint)
    right = grams_of(Pass(walker, samples(), spill=tmp_path))
    monkeypatch.setattr(calibration, "IN_MEMORY", 0)
    mapped = []
    monkeypatch.setattr(torch, "from_file", lambda *a, was=torch.from_file, **k: mapped.append(a) or was(*a, **k))
    found = grams_of(Pass(walker, samples(), spill=tmp_path))
    assert len(mapped) == 2 * 2  # layers, batches
    assert all(torch.equal(one[2], other[2]) for one, other in zip(found, right, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replaced_weights_are_what_later_layers_are_calibrated_on(tmp_path):
    model, checkpoint = saved(tmp_path, "llama, tied")

    def change(passed):
        for module in linears_of(passed.module).values():
            module.weight.mul_(0.5)

    found = grams_of(Pass(streamed(checkpoint), samples(), spill=tmp_path, replace=change))
    for module in linears_of(model.model.layers[0]).values():
        module.weight.data *= 0.5
    inputs = inputs_of(model, samples())
    for layer, names, gram in found:
        x = inputs[f"{layer}.{names[0]}"]
        if layer.endswith("layers.1") and names[0].endswith("q_proj"):
            assert torch.allclose(gram.double(), x.T @ x, rtol=1e-4, atol=1e-5)


def test_a_pass_that_is_left_early_leaves_gradients_on(tmp_path):
    _, checkpoint = saved(tmp_path, "llama, tied")
    going = iter(Pass(streamed(checkpoint), samples(), spill=tmp_path))
    next(going)
    assert torch.is_grad_enabled()
    going.close()


def test_inputs_that_are_no_numbers_are_named_by_layer(tmp_path):
    def overflow(model):
        model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.inf

    _, checkpoint = saved(tmp_path, "llama, tied", overflow)
    with pytest.raises(NonFinite, match=r"^model\.layers\.1\.mlp\.gate_proj: its inputs hold NaN or infinity"):
        grams_of(Pass(streamed(checkpoint), samples(), spill=tmp_path))


def test_a_module_that_never_ran_is_named():
    grams = Grams({"used": torch.nn.Linear(4, 4), "spare": torch.nn.Linear(4, 4)})
    with grams.listening():
        grams._linears["used"](torch.ones(2, 4))
    with pytest.raises(StageFailed, match=r"^layers\.0\.spare: never ran on the calibration rows"):
        grams.finish("layers.0")


def test_weights_that_are_stored_in_parts_are_refused_before_the_pass(tmp_path):
    _, checkpoint = saved(tmp_path, "mixtral")
    with pytest.raises(UnsupportedFormat, match=r"is stored in parts, such as .*experts"):
        streamed(checkpoint)


def test_an_error_between_two_layers_reaches_the_caller_and_ends_every_thread(tmp_path):
    _, checkpoint = saved(tmp_path, "llama, tied")
    walker = streamed(checkpoint)
    with pytest.raises(IndexError):
        grams_of(Pass(walker, [[VOCABULARY + 1] * LENGTH], spill=tmp_path))
    assert "forward" not in vars(next(iter(walker.layers.values())))
