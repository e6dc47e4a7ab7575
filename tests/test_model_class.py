"""The class that config.json names is the one that builds and loads the model."""

import pytest
import transformers

from pipeline.model_class import class_of, lacks

OWN = {
    "architectures": ["OwnModel"],
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel"},
}


@pytest.mark.parametrize(
    ("config", "trusted", "expected"),
    [
        ({"architectures": ["BertForTokenClassification"]}, False, transformers.BertForTokenClassification),
        ({"architectures": ["BertForTokenClassification", "BertModel"]}, True, transformers.BertForTokenClassification),
        ({}, False, transformers.AutoModelForCausalLM),
        ({"architectures": None}, False, transformers.AutoModelForCausalLM),
        ({"architectures": ["Marvel"]}, False, transformers.AutoModelForCausalLM),
        ({"architectures": ["AutoConfig"]}, False, transformers.AutoModelForCausalLM),
        ({"architectures": ["PreTrainedModel"]}, False, transformers.AutoModelForCausalLM),
        (OWN, True, transformers.AutoModelForMaskedLM),
        (OWN, False, transformers.AutoModelForCausalLM),
        ({**OWN, "auto_map": ["AutoModel"]}, True, transformers.AutoModelForCausalLM),
        ({**OWN, "architectures": ["LlamaForCausalLM"]}, True, transformers.LlamaForCausalLM),
        ({"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.LlamaForCausalLM"}}, True,
         transformers.AutoModelForCausalLM),
    ],
)  # fmt: skip
def test_the_class_of_a_config(config, trusted, expected):
    assert class_of(config, trust_remote_code=trusted) is expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LlamaForCausalLM", ""),
        ("GPTNeoXForCausalLM", ""),
        ("T5ForConditionalGeneration", ""),
        ("LlavaForConditionalGeneration", ""),
        ("LlamaForSequenceClassification", ""),
        ("AutoModelForCausalLM", ""),
        ("LlamaModel", "has no logits"),
        ("BertModel", "has no logits"),
        ("BertForQuestionAnswering", "has no logits"),
        ("CLIPModel", "has no logits"),
        ("ViTForImageClassification", "takes no token ids"),
        ("WhisperForConditionalGeneration", "takes no token ids"),
    ],
)
def test_a_class_that_gives_no_logits_for_tokens_is_told_without_a_model(name, said):
    assert lacks(getattr(transformers, name)) == said
