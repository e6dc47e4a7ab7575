"""What the plan says a stage will ask of the machine."""

from pipeline.needs import quantizing_memory
from pipeline.recipe import Recipe
from pipeline.sizes import Sizes
from pipeline.targets import parse_target


def recipe() -> Recipe:
    return Recipe.model_validate(
        {"schema": 1, "name": "bot", "source": "somewhere", "quantize": [{"format": "bitsandbytes"}]}
    )


def test_quantizing_takes_the_memory_of_the_largest_target_reloaded():
    """Many layers: one of them is small beside the whole."""
    layers = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(200)}
    sizes, targets = Sizes(shapes=layers), [parse_target("nf4"), parse_target("int8")]
    assert quantizing_memory(recipe(), sizes, targets) == sizes.quantized_bytes(targets[1], "bfloat16") == 200 << 20


def test_a_gguf_file_is_dense_once_it_is_loaded_and_a_layer_is_whole_where_the_engine_rounds_it():
    layers = {
        f"model.layers.{i}.mlp.{name}.weight": (1024, 1024) for i in range(100) for name in ("up_proj", "down_proj")
    }
    sizes = Sizes(shapes=layers)
    assert quantizing_memory(recipe(), sizes, [parse_target("gguf")]) == sizes.dense_bytes("float32")
    single = Sizes(shapes=dict(list(layers.items())[:2]))
    nearest = parse_target("gptq:rounding=nearest")
    assert quantizing_memory(recipe(), single, [nearest]) == 3 * 4 * 2 * 1024**2
    assert quantizing_memory(recipe(), single, [parse_target("nf4")]) < 3 * 4 * 2 * 1024**2


def test_what_lies_outside_of_the_layers_is_in_memory_in_float32_when_the_answer_is_compared():
    shapes = {"model.embed_tokens.weight": (100_000, 1024), "lm_head.weight": (100_000, 1024)}
    sizes = Sizes(shapes={**shapes, "model.layers.0.mlp.up_proj.weight": (1024, 1024)})
    assert quantizing_memory(recipe(), sizes, [parse_target("nf4")]) >= 4 * 2 * 100_000 * 1024
