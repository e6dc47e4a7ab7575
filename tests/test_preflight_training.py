"""The plan refuses a training that the installed libraries would not do, and names the way that works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import preflight_training, trainability
from pipeline.catalog import FORMATS
from pipeline.errors import DataError, InputError, RecipeError
from pipeline.plan import make_plan
from pipeline.recipe import parse_recipe
from pipeline.trainability import Answer, ask
from tests.checkpoints import tiny_llama
from tests.every_format import STANDING_FOR, good

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
RECIPE = """
schema: 1
name: bot
source: {source}
train: {{method: lora, data: {root}/text.jsonl}}
store: {root}/store
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    tiny_llama(folder / "dense")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    (folder / "labels.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(20))
    )
    return folder


@pytest.fixture(autouse=True)
def _asked_here(monkeypatch):
    """The answers come from this process: a child for each plan would pay the imports again."""
    monkeypatch.setattr(preflight_training.child, "run", lambda _, *given, **__: ask(*given))


def source(root: Path, name: str) -> Path:
    folder = root / name.replace(" ", "-")
    if not folder.exists():
        good(folder, name)
    return folder / "model.gguf" if name == "gguf" else folder


def plan(root: Path, name: str, *overrides: str):
    path = root / "dense" if name == "dense" else source(root, name)
    text = RECIPE.format(root=root, source=path)
    return make_plan(parse_recipe(text, where="r.yaml", overrides=[each.format(root=root) for each in overrides]))


@pytest.mark.parametrize("name", ["gptq", "nf4"])
def test_quantized_weights_themselves_do_not_train(root, name):
    with pytest.raises(RecipeError, match=r"trains the weights themselves.*use base dense, which upcasts first"):
        plan(root, name, "train.method=full", "train.base=source")


COLUMNS: dict[str, tuple[str, ...]] = {
    "lora": ("train.method=lora",),
    "head, projector (features)": ("train.method=head", "train.engine=features", "train.data={root}/labels.jsonl"),
    "head, projector (trainer)": ("train.method=projector", "train.engine=trainer", "train.data={root}/labels.jsonl"),
    "full": ("train.method=full",),
    "qat": ("train.method=qat", "quantize=[{{format: gptq, group_size: 32}}]", "calibration.data={root}/text.jsonl"),
}


def cells() -> list[tuple[str, str, str]]:
    """Format, method and what docs/training.md says of the two."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    heading = next(row for row in rows if row[0] == "source")
    return [(row[0], name, said) for row in rows if row[0] in FORMATS
            for name, said in zip(heading[1:], row[1:], strict=True)]  # fmt: skip


def test_the_page_speaks_of_every_format_and_method():
    assert {name for name, _, _ in cells()} == FORMATS.keys()
    assert {column for _, column, _ in cells()} == COLUMNS.keys()


@pytest.mark.parametrize(("name", "column", "said"), cells())
def test_a_cell_of_the_page_is_what_the_plan_says(root, name, column, said):
    stands_for = STANDING_FOR[name][0]
    if said == "no":
        with pytest.raises(InputError, match="cannot be reloaded"):
            plan(root, stands_for, *COLUMNS[column], "train.base=dense")
        return
    assert plan(root, stands_for, *COLUMNS[column], "train.base=dense").step("train")
    if said == "yes":
        assert plan(root, stands_for, *COLUMNS[column], "train.base=source").step("train")
    else:
        assert said == "upcast"
        with pytest.raises(RecipeError, match="upcast"):
            plan(root, stands_for, *COLUMNS[column], "train.base=source")


def test_the_quantizer_is_asked_not_a_table(root, monkeypatch):
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

    raw = json.loads((source(root, "gptq") / "config.json").read_text())["quantization_config"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert ask(config, raw, trust_remote_code=False).adapters
    monkeypatch.setattr(GptqHfQuantizer, "is_trainable", property(lambda _: False))
    assert not ask(config, raw, trust_remote_code=False).adapters


def test_a_quantizer_that_does_not_train_is_refused_by_name_and_version(root, monkeypatch):
    answer = Answer(adapters=False, versions={"transformers": "5.23.0"})
    monkeypatch.setattr(preflight_training.child, "run", lambda *_, **__: answer)
    with pytest.raises(RecipeError, match=r"does not train on GPTQ \(transformers 5.23.0\); use base dense"):
        plan(root, "gptq", "train.base=source")


@pytest.mark.parametrize("base", ["source", "nf4"])
def test_a_quantized_base_is_never_compiled(root, base):
    name = "gptq" if base == "source" else "dense"
    with pytest.raises(RecipeError, match="torch_compile does not work on a quantized base"):
        plan(root, name, f"train.base={base}", "train.arguments.torch_compile=true")
    assert plan(root, name, "train.arguments.torch_compile=true").step("train")  # on dense weights it may be


def test_peft_older_than_its_integration_is_refused(root, monkeypatch):
    monkeypatch.setattr(trainability, "peft_version", lambda: (0, 17))
    with pytest.raises(RecipeError, match=r"needs peft 0.18 or newer, found 0.17"):
        plan(root, "dense")


@pytest.mark.parametrize(("name", "base"), [("gptq", "source"), ("dense", "nf4"), ("dense", "int8")])
def test_trainer_takes_no_quantized_backbone_without_adapters(root, name, base):
    labels = ("train.method=projector", "train.data={root}/labels.jsonl", f"train.base={base}")
    with pytest.raises(RecipeError, match="use engine features, or base dense"):
        plan(root, name, *labels, "train.engine=trainer")
    assert plan(root, name, *labels).step("train").options["engine"] == "features"


def test_the_loop_on_features_refuses_the_arguments_that_it_does_not_heed(root):
    labels = ("train.method=projector", "train.data={root}/labels.jsonl", "train.arguments.optim=sgd")
    with pytest.raises(RecipeError, match="optim is Trainer's, the loop on features knows adam_beta1"):
        plan(root, "dense", *labels)
    assert plan(root, "dense", *labels, "train.engine=trainer").step("train")


def test_a_projector_needs_a_model_with_hidden_states(root, monkeypatch):
    monkeypatch.setattr(preflight_training.child, "run", lambda *_, **__: Answer(hidden_states=False))
    with pytest.raises(RecipeError, match="needs a model that gives hidden states"):
        plan(root, "dense", "train.method=projector", "train.data={root}/labels.jsonl")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pairs_teach_a_projector_alone(root, method):
    (root / "pairs.jsonl").write_text('{"anchor": "a cat", "positive": "a kitten"}\n' * 3)
    with pytest.raises(DataError, match=f"holds pairs rows, and method {method} learns from"):
        plan(root, "dense", f"train.method={method}", "train.data={root}/pairs.jsonl")


def test_qat_needs_a_grid_of_integers(root):
    with pytest.raises(RecipeError, match="name a gptq or awq target first"):
        plan(root, "dense", "train.method=qat", "quantize=[{{format: bitsandbytes}}]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.trainable=[a]",), "train.trainable does not go with method lora"),
        (("train.engine=features",), "train.engine is for head and projector"),
        (("train.method=full", "train.merge_base=original"), "train.merge_base is for lora"),
        (("train.base=nf4", "train.merge_base=better"), "set train.data.validation"),
        (
            ("train.method=head", "train.engine=features", "train.trainable=[a]"),
            "train.engine features computes them once, but train.trainable changes them",
        ),
        (
            ("train.method=head", "train.engine=features", "train.arguments.neftune_noise_alpha=5"),
            "neftune_noise_alpha changes them",
        ),
        (("evaluate.data=held_out",), "set train.data.held_out"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_by_the_recipe(root, overrides, said):
    with pytest.raises(RecipeError, match=said):
        plan(root, "dense", "train.data={{path: {root}/text.jsonl}}", *overrides)


def test_augmentation_and_company_make_trainer_the_default_for_a_head(root):
    labels = ("train.method=head", "train.data={root}/labels.jsonl")
    engines = [
        plan(root, "dense", *labels, *more).step("train").options["engine"]
        for more in ((), ("train.trainable=[model.layers.1.*]",), ("train.arguments.neftune_noise_alpha=5",))
    ]
    assert engines == ["features", "trainer", "trainer"]


def test_the_plan_itself_imports_neither_torch_nor_transformers(root):
    """The one that is asked is a child; a recipe that trains on a quantized base is planned without them too."""
    text = RECIPE.format(root=root, source=source(root, "gptq")).replace("lora,", "lora, base: source,")
    (root / "r.yaml").write_text(text)
    code = (
        "import sys; from pathlib import Path; from pipeline.plan import make_plan; "
        "from pipeline.recipe import load_recipe; make_plan(load_recipe(Path(sys.argv[1]))); "
        "print({'torch', 'transformers', 'peft', 'prefect'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root / "r.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
